"""The command line: each verb checks what it was given, calls one function, prints what came of it."""

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from orbithash.cluster.connection import (
    CaOption,
    CertKeyOption,
    CertOption,
    Connection,
    GatewayOption,
    TokenFileOption,
)
from orbithash.encoders.errors import InputError
from orbithash.search.logs import Format

__all__ = ["app", "main"]

DEFAULT_ADDRESS = "127.0.0.1:50051"

app = typer.Typer(
    help="Train, encode, search and evaluate Earth-observation imagery by learned binary codes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Measurements, each beside a baseline of the same run.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

DataOption = Annotated[Path, typer.Option("--data", help="Folder of images, one folder a class.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ModelOption = Annotated[Path, typer.Option("--model", help="Model folder, RUN/model.")]
AddressOption = Annotated[str, typer.Option("--address", help="HOST:PORT of the gateway.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; may be repeated.")]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="Backbone weights: a safetensors file, or torchvision's name.")
]


@app.callback()
def common(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options before the verb."""
    _State.debug = debug


class _State:
    debug = False


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed inside, 2 the input is wrong."""
    # Also where typer does not see it: in the arguments after the verb.
    if "--debug" in sys.argv[2:]:
        sys.argv.remove("--debug")
        sys.argv.insert(1, "--debug")
    try:
        # Or typer would frame its errors and exit by itself.
        code = app(prog_name="orbithash", standalone_mode=False)
    except Exception as err:
        usage = _usage_error(err)
        is_users = usage is not None or isinstance(err, InputError)
        if _State.debug:
            traceback.print_exc()
        elif usage is not None:
            print(usage, end="\n" if usage else "", file=sys.stderr)
        else:
            hint = "" if is_users else " (orbithash --debug VERB … shows where)"
            name = "" if is_users else f"{type(err).__name__}: "
            print(f"error: {name}{_first_lines(err)}{hint}", file=sys.stderr)
        raise SystemExit(2 if is_users else 1) from None
    raise SystemExit(code)


def _usage_error(err: Exception) -> str | None:
    """One line for words that are no command: typer's own errors, known by their method. None for any other error."""
    if not hasattr(err, "format_message"):
        return None
    problem = err.format_message().rstrip(".")
    if not problem:
        # Nothing was asked, and typer has shown the help.
        return ""
    if values := getattr(err.__cause__, "errors", None):
        problem += f", got {values()[0]['input']!r}"
    context = getattr(err, "ctx", None)
    return f"error: {problem}; see {context.command_path if context else 'orbithash'} --help"


def _first_lines(err: Exception) -> str:
    """All of what we say to a user; of what libraries say, the first line."""
    text = str(err)
    return text if isinstance(err, InputError) else text.splitlines()[0] if text else "no message"


def _print_json(value: Any) -> None:
    print(json.dumps(value, default=str))


@app.command(epilog="Example: orbithash demo --data UCMerced_LandUse --weights IMAGENET1K_V2 --out runs/ucmd")
def demo(
    data: Annotated[Path | None, typer.Option("--data", help="Labelled images; without: generated scenes.")] = None,
    weights: WeightsOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of everything the demo makes.")] = Path("runs/demo"),
    captions: Annotated[Path | None, typer.Option("--captions", help="Sentences about --data, as JSON.")] = None,
    settings: SetOption = None,
) -> None:
    """Runs the whole chain on this machine: train, evaluate, encode, serve, query; writes a report."""
    from orbithash.cluster.demo import run_demo

    run_demo(out, data, weights, settings or [], captions)


@app.command(epilog="Example: orbithash scenes data/scenes --count 600")
def scenes(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    count: Annotated[int, typer.Option("--count", help="Scenes to draw.")] = 600,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int, typer.Option("--size", help="Pixels a side.")] = 128,
) -> None:
    """Draws georeferenced land-use scenes with a second source, labels and captions."""
    from orbithash.cluster.progress import track
    from orbithash.trainers.scenes import write_scenes

    with track("drawing", count, "scenes") as advance_to:
        write_scenes(directory, count, seed, size, on_progress=lambda done: advance_to(done, ""))


@app.command(epilog="Example: orbithash wald UCMerced_LandUse data/ucmd_pairs --factor 4")
def wald(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of RGB images, with a folder for each class or none.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    factor: Annotated[int, typer.Option("--factor", help="How much coarser the first source is.")] = 4,
) -> None:
    """Makes pairs of sources of RGB images: coarse colour and fine grey of the same ground (Wald's protocol)."""
    from orbithash.cluster.progress import say, track
    from orbithash.trainers.datasets.layouts import cut
    from orbithash.trainers.datasets.wald import count_images, write_wald_pairs

    with track("degrading", count_images(source), "images") as advance_to:
        pairs = write_wald_pairs(source, out, factor, on_progress=lambda done: advance_to(done, ""))
    for problem in cut(pairs.refused):
        say(f"left out: {problem}")
    say(f"{pairs.count} pairs are in {out}; {len(pairs.refused)} images were left out")


@app.command(epilog="Example: orbithash train dhcl --data UCMerced_LandUse --bits 64 --workers 2 --out runs/ucmd")
def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Name of the method, such as dhcl.")],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Run folder; an interrupted run in it goes on.")],
    dataset: Annotated[str | None, typer.Option("--dataset", help="Its name, such as ucmd; else recognised.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="How to split; else the dataset's own.")] = None,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Chooses the split.")] = 0,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of the training images held back to choose the epoch; 0: none.")
    ] = 0.1,
    captions: Annotated[
        Path | None, typer.Option("--captions", help="JSON file of sentences about the images, Karpathy style.")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of a code.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Ray Train workers.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option("--gpus-per-worker", help="GPUs for each worker.")] = 0,
    weights: WeightsOption = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")] = None,
    settings: SetOption = None,
) -> None:
    """Trains a method and leaves a run folder with the model of its best validation epoch."""
    from orbithash.cluster.progress import say
    from orbithash.cluster.train import prepare_run, train_on_ray

    run = prepare_run(
        method,
        data,
        dataset,
        protocol,
        config,
        settings or [],
        split_seed=split_seed,
        validation=validation,
        captions=captions,
        bits=bits,
        weights=weights,
    )
    if run.config.weights is None and config is None:
        say(
            "no --weights: the network starts from random ones, for which the default settings are not meant; "
            "trainers/recipes/from_scratch.yaml (--config) has some that are"
        )
    train_on_ray(run, out, workers, gpus_per_worker)


@app.command(epilog="Example: orbithash evaluate runs/ucmd --data UCMerced_LandUse")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    data: DataOption,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Another split than the run's own.")] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="One of the lengths of a run with nested_bits.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Simple methods on the pretrained features, too.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Evaluates a run's model on its test part: metrics, plots, a page."""
    from orbithash.cluster.evaluate import evaluate_run

    metrics, page = evaluate_run(run, data, protocol, baselines, bits=bits)
    if as_json:
        _print_json(metrics)
    else:
        for name, value in metrics["metrics"].items():
            if "->" in name:
                print(name)
            for metric, figures in value.items() if "->" in name else [(name, value)]:
                print(f"{metric:<20} {figures['expected']:.4f}")
        print(f"report: {page}")


@app.command(epilog="Example: orbithash reproduce mhcln dhcl --data UCMerced_LandUse --weights IMAGENET1K_V2 --seeds 5")
def reproduce(
    data: DataOption,
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="Names; without: all that the data allow.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and the table; goes on where it stopped.")] = (
        Path("runs/reproduce")
    ),
    bits: Annotated[list[int] | None, typer.Option("--bits", help="Bits of a code; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Splits and trainings of each.")] = 1,
    captions: Annotated[Path | None, typer.Option("--captions", help="JSON file of sentences, for DUCH.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Ray Train workers.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option("--gpus-per-worker", help="GPUs for each worker.")] = 0,
    weights: WeightsOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for all that have it, or method.key=value.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Trains and evaluates methods by their papers' own protocols, beside the published figures."""
    from orbithash.cluster.reproduce import reproduce as run_reproduce
    from orbithash.cluster.reproduction_table import show

    rows = run_reproduce(
        methods or [],
        data,
        out,
        bits=bits or [64],
        num_seeds=seeds,
        weights=weights,
        captions=captions,
        settings=settings or [],
        workers=workers,
        gpus_per_worker=gpus_per_worker,
    )
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
    else:
        show(rows)
        print(f"table: {out / 'results.md'}, report: {out / 'report.html'}")


@app.command(epilog="Example: orbithash encode tiles/ --model runs/ucmd/model --archive archive")
def encode(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, list, Parquet, STAC items or GeoTIFFs.")],
    model: ModelOption,
    archive: Annotated[str, typer.Option("--archive", help="Archive to make or to continue.")],
    workers: Annotated[str | None, typer.Option("--workers", help="Encoding actors, MIN:MAX or a number.")] = None,
    tile: Annotated[int | None, typer.Option("--tile", help="Cut GeoTIFF scenes into tiles of so many pixels.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Encodes images into an archive; goes on where it stopped. Refused images go to the archive's side table."""
    from orbithash.cluster.encode import encode as run_encode
    from orbithash.cluster.encode import parse_workers

    summary = run_encode(source, model, archive, parse_workers(workers), tile)
    if as_json:
        _print_json(summary.to_json())
    else:
        print(summary)


@app.command(epilog="Example: orbithash serve archive --model runs/ucmd/model --shards 2")
def serve(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Archive of codes.")],
    model: ModelOption,
    shards: Annotated[int, typer.Option("--shards", help="Parts of the index, each in an actor.")] = 2,
    replicas: Annotated[int, typer.Option("--replicas", help="Copies of each part, which stand in for another.")] = 1,
    index: Annotated[str, typer.Option("--index", help="flat, multi-hash, ivf, hnsw or gpu-flat.")] = "flat",
    address: AddressOption = DEFAULT_ADDRESS,
    local: Annotated[bool, typer.Option("--local", help="All in this process, without Ray.")] = False,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate of the gateway, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its key, PEM, without a password.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option("--client-ca", help="Ask clients for certificates that one of these signed, PEM.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="Ask for tokens: a file of lines ROLE TOKEN NAME, read or write.")
    ] = None,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="Listen beyond this machine also without TLS and tokens.")
    ] = False,
    reflection: Annotated[bool, typer.Option("--reflection", help="Tell tools such as grpcurl the calls.")] = False,
    metrics: Annotated[str | None, typer.Option("--metrics", help="HOST:PORT of figures for Prometheus.")] = None,
    log_format: Annotated[Format, typer.Option("--log-format", help="Lines of the log, on stderr.")] = Format.TEXT,
) -> None:
    """Serves an archive over gRPC until it is told to stop (SIGTERM or Ctrl-C)."""
    from orbithash.cluster.serve import serve as run_serve
    from orbithash.search.protection import Protection

    protection = Protection.from_files(tls_cert, tls_key, client_ca, tokens, insecure_listen, reflection)
    run_serve(archive, model, shards, address, local, replicas, index, protection, metrics, log_format)


@app.command(epilog="Example: orbithash query --image tile.png -k 5 --filter \"label = 'harbor'\"")
def query(
    image: Annotated[Path | None, typer.Option("--image", help="Image file to search by.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Sentence to search by.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Key of a row to search by.")] = None,
    code: Annotated[str | None, typer.Option("--code", help="Code to search by, in hexadecimal.")] = None,
    like: Annotated[list[str] | None, typer.Option("--like", help="Key of a good example; may be repeated.")] = None,
    unlike: Annotated[list[str] | None, typer.Option("--unlike", help="Key of a bad example, beside --like.")] = None,
    k: Annotated[int, typer.Option("-k", help="Number of hits.")] = 10,
    radius: Annotated[int | None, typer.Option("--radius", help="Only rows at most so many bits away.")] = None,
    filter_: Annotated[str, typer.Option("--filter", help="Only rows for which this is true, in CQL2 text.")] = "",
    after: Annotated[str | None, typer.Option("--after", help="DISTANCE:ID after which the page begins.")] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="uri, caption, thumbnail, footprint or code; for --json.")
    ] = None,
    min_coverage: Annotated[float, typer.Option("--min-coverage", help="Least share of the archive.")] = 0.0,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Asks a gateway for the nearest images."""
    from orbithash.cluster.query import as_fields, as_table, make_query

    asked = make_query(
        image,
        text,
        key,
        code,
        like or (),
        unlike or (),
        after,
        k=k,
        radius=radius,
        filter=filter_,
        include=tuple(include or ()),
        min_coverage=min_coverage,
    )
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        answer = client.search(asked)
    if as_json:
        _print_json(as_fields(answer))
    else:
        as_table(answer)


@app.command(epilog="Example: orbithash upsert new_tiles/")
def upsert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, image, list, Parquet or STAC items.")],
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 60.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes images into the archive of a running gateway, which encodes them; searches see them at once."""
    from orbithash.cluster.changes import upsert_source

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        done = upsert_source(client, source)
    if as_json:
        _print_json({"written": done.num_written, "refused": done.refused})
        return
    for refused_key, reason in done.refused.items():
        print(f"refused {refused_key}: {reason}", file=sys.stderr)
    print(f"wrote {done.num_written} rows" + (f", refused {len(done.refused)}" if done.refused else ""))


@app.command(epilog="Example: orbithash delete harbor/harbor_0001.tif")
def delete(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys of rows.")] = None,
    file: Annotated[Path | None, typer.Option("--keys", help="File with one key a line; - for standard input.")] = None,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 60.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Removes rows from the archive of a running gateway."""
    from orbithash.cluster.changes import delete_keys

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        removed = delete_keys(client, keys or [], file)
    if as_json:
        _print_json({"removed": removed})
    else:
        print(f"removed {removed} rows")


@app.command(epilog="Example: orbithash status --json")
def status(
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Says what a gateway serves; exit code 1 when a part of the archive cannot be searched."""
    from orbithash.cluster.status import as_fields, as_table, read_status

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        found = read_status(client)
    if as_json:
        _print_json(as_fields(found))
    else:
        as_table(found)
    if not found.is_whole:
        raise typer.Exit(1)


@app.command(epilog="Example: orbithash duplicates archive --radius 2 --filter \"label = 'harbor'\"")
def duplicates(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Archive of codes.")],
    radius: Annotated[int, typer.Option("--radius", help="Bits that neighbours in a group differ in, at most.")] = 0,
    filter_: Annotated[str, typer.Option("--filter", help="Only rows for which this is true, in CQL2 text.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Finds groups of rows whose codes are linked by small distances, the largest group first."""
    from orbithash.cluster.query import find_duplicates

    groups = find_duplicates(archive, radius, filter_)
    if as_json:
        _print_json({"groups": groups})
        return
    for keys in groups:
        print(*keys, sep="\t")
    print(f"{len(groups)} groups, {sum(map(len, groups))} rows", file=sys.stderr)


@bench_app.command("encode", epilog="Example: orbithash bench encode --count 2000")
def bench_encode(
    model: Annotated[Path | None, typer.Option("--model", help="Model folder; without: a mobilenet_v2.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Images; without: generated scenes.")] = None,
    count: Annotated[int, typer.Option("--count", help="Images to encode.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Rows per second of the Ray Data pipeline beside a bare loop with as many threads."""
    from orbithash.cluster.bench import bench_encode as run_bench
    from orbithash.cluster.bench import show

    show(run_bench(model, data, count), as_json)


@bench_app.command("train", epilog="Example: orbithash bench train --epochs 3")
def bench_train(
    data: Annotated[Path | None, typer.Option("--data", help="Labelled images; without: generated scenes.")] = None,
    weights: WeightsOption = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of each run.")] = 3,
    workers: Annotated[int, typer.Option("--workers", help="Ray Train workers, which share the cores.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Images per second of each Ray Train worker beside the bare loop with as many threads."""
    from orbithash.cluster.bench import bench_train as run_bench
    from orbithash.cluster.bench import show

    show(run_bench(data, weights, epochs, workers), as_json)


@bench_app.command("search", epilog="Example: orbithash bench search --rows 1000000 --bits 64 --out runs/bench")
def bench_search(
    rows: Annotated[int, typer.Option("--rows", help="Random codes.")] = 1_000_000,
    bits: Annotated[int, typer.Option("--bits", help="Bits of a random code.")] = 64,
    distinct: Annotated[
        float | None, typer.Option("--distinct", help="Share of the random codes that are distinct, such as 0.1.")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="Hits of a query.")] = 10,
    queries: Annotated[int, typer.Option("--queries", help="Asked of each engine, alone and in batches of 64.")] = 512,
    radius: Annotated[
        int | None, typer.Option("--radius", help="Hits at most so many bits away: compares flat and multi-hash.")
    ] = None,
    archive: Annotated[Path | None, typer.Option("--archive", help="The codes of an archive, not random ones.")] = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="Such as flat or hnsw; may be repeated; without: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of results.json and plots.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Our indexes beside FAISS, numpy and other installed engines over the same codes, on one core."""
    from orbithash.cluster.bench_search import SearchBench, show_search
    from orbithash.cluster.bench_search import bench_search as run_bench

    asked = SearchBench(rows, bits, distinct, k, queries, radius, archive, tuple(engine or ()))
    show_search(run_bench(asked, out), as_json)


@bench_app.command("serve", epilog="Example: orbithash bench serve --rows 100000 --local")
def bench_serve(
    rows: Annotated[int, typer.Option("--rows", help="Random codes.")] = 100_000,
    bits: Annotated[int, typer.Option("--bits", help="Bits of a code.")] = 64,
    shards: Annotated[int, typer.Option("--shards", help="Parts of the index.")] = 2,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Requests at a time.")] = 16,
    requests: Annotated[int, typer.Option("--requests", help="Requests to each of the two services.")] = 4000,
    local: Annotated[bool, typer.Option("--local", help="All shards in the gateway's process, without Ray.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Requests to a gateway beside requests to an empty gRPC service: rates and latencies."""
    from orbithash.cluster.bench import show
    from orbithash.cluster.bench_serve import bench_serve as run_bench

    show(run_bench(rows, bits, shards, in_flight, requests, local), as_json)


@bench_app.command("soak", epilog="Example: orbithash bench soak --minutes 15")
def bench_soak(
    rows: Annotated[int, typer.Option("--rows", help="Random codes.")] = 100_000,
    bits: Annotated[int, typer.Option("--bits", help="Bits of a code.")] = 64,
    shards: Annotated[int, typer.Option("--shards", help="Parts of the index.")] = 2,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Searches at a time.")] = 16,
    minutes: Annotated[float, typer.Option("--minutes", help="How long.")] = 15.0,
    local: Annotated[bool, typer.Option("--local", help="All shards in the gateway's process, without Ray.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A gateway under the highest load while rows come and go: errors, and the slope of its memory."""
    from orbithash.cluster.bench import show
    from orbithash.cluster.bench_soak import bench_soak as run_bench

    show(run_bench(rows, bits, shards, in_flight, minutes, local), as_json)
