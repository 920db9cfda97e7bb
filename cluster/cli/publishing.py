"""Verbs that publish models: card, push, pull."""

from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import LEARN, JsonOption
from orbithash.cluster.output import print_json, say

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=LEARN, epilog="Example: orbithash card runs/ucmd --licence cc-by-4.0 --provider 'Our lab'"
)
def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a complete run.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model. Default: DATASET-METHOD-BITS.")] = "",
    licence: Annotated[
        str, typer.Option("--licence", help="Licence of the model, such as apache-2.0. Default: not stated.")
    ] = "",
    data_licence: Annotated[
        str, typer.Option("--data-licence", help="Licence of the training data. Default: not stated.")
    ] = "",
    provider: Annotated[
        str, typer.Option("--provider", help="Organisation or person that publishes the model. Default: not stated.")
    ] = "",
    bbox: Annotated[
        str | None,
        typer.Option("--bbox", metavar="W,S,E,N", help="Extent of the training data, degrees. Default: not stated."),
    ] = None,
    dates: Annotated[
        str,
        typer.Option(
            "--dates", metavar="START/END", help="First and last date of the training data. Default: not stated."
        ),
    ] = "",
    bits: Annotated[
        int | None, typer.Option("--bits", help="A shorter length of a run with nested_bits. Default: the whole code.")
    ] = None,
    no_examples: Annotated[
        bool, typer.Option("--no-examples", help="Leave out keys and captions of the worst queries.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model card of a run, RUN/model/README.md, and its STAC item, RUN/model/stac-item.json.

    The card shows settings, training data, the metrics of `orbithash evaluate` and where the model fails. Options state
    what a run does not know. Running it again replaces both files; the model_id does not change.
    """
    from orbithash.trainers.publishing.statements import Licence, Statements, parse_bbox
    from orbithash.trainers.publishing.write import CARD, STAC_ITEM, write_card

    statements = Statements(
        name=name,
        licence=Licence(licence.strip()),
        provider=provider.strip(),
        data_licence=Licence(data_licence.strip()),
        bbox=None if bbox is None else parse_bbox(bbox),
        dates=dates,
        has_examples=not no_examples,
    )
    model = write_card(run, statements, bits)
    evaluations = [evaluation.folder for evaluation in model.evaluations]
    if as_json:
        print_json(
            {
                "card": str(model.folder / CARD),
                "stac_item": str(model.folder / STAC_ITEM),
                "model_id": model.model_id,
                "evaluations": evaluations,
                "skipped_evaluations": list(model.skipped),
            }
        )
        return
    for reason in model.skipped:
        say(f"{reason}: left out")
    if not evaluations:
        say(f"without results: run `orbithash evaluate {run} --data FOLDER`, and then this command again")
    if not licence:
        say("the licence of the model is not stated; --licence states it")
    say(f"wrote {model.folder / CARD} and {model.folder / STAC_ITEM}")


@verbs.command(rich_help_panel=LEARN, epilog="Example: orbithash push runs/ucmd our-lab/ucmd-dhcl-64")
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a complete run, or a model folder.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@BRANCH]", help="Name of the model on the hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public. Default: private; an existing one stays.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a model with its card to the Hugging Face hub.

    The model needs a card (`orbithash card`), and you need a token: `hf auth login`, or HF_TOKEN. Only the files of the
    model folder are uploaded, in one commit.
    """
    from orbithash.encoders.networks.exchange import is_model_folder, push_model

    sent = push_model(run if is_model_folder(run) else run / "model", name, is_public=public)
    if as_json:
        print_json({"name": sent.name, "commit": sent.commit, "url": sent.url, "model_id": sent.model_id})
    else:
        say(f"uploaded {sent.num_bytes:,} bytes to {sent.url}, commit {sent.commit}")


@verbs.command(rich_help_panel=LEARN, epilog="Example: orbithash pull our-lab/ucmd-dhcl-64 models/ucmd")
def pull(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="Name of the model on the hub.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder to create or to replace.")],
    as_json: JsonOption = False,
) -> None:
    """Download a model from the Hugging Face hub into a folder for --model.

    Only JSON, safetensors, the tokenizer and texts are downloaded, and they are checked. DIR appears whole or not at
    all; after an interruption, the same command downloads the missing files. A private or gated model needs a token:
    `hf auth login`, or HF_TOKEN.
    """
    from orbithash.encoders.networks.exchange import pull_model

    found = pull_model(name, folder)
    if as_json:
        print_json({"folder": str(folder), "name": found.name, "commit": found.commit, "model_id": found.model_id})
    else:
        say(f"wrote {folder}: {found.name} at commit {found.commit}, model {found.model_id}")
