"""Verbs about detectors: detector, detect."""

from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import (
    ARCHIVE,
    DEFAULT_ADDRESS,
    SEARCH,
    CaOption,
    CertKeyOption,
    CertOption,
    Connection,
    FilterOption,
    GatewayOption,
    JsonOption,
    TimeoutOption,
    TokenFileOption,
)
from orbithash.cluster.output import print_json

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=SEARCH,
    epilog="Example: orbithash detector --good @good.txt --bad @bad.txt --out detector.json",
)
def detector(
    good: Annotated[
        list[str],
        typer.Option(
            "--good",
            metavar="KEY",
            help="Key of a row of the kind to find, or @FILE with one key per line; may be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write, JSON; replaced if it exists.")],
    bad: Annotated[
        list[str] | None,
        typer.Option(
            "--bad",
            metavar="KEY",
            help="Key of a row of another kind, or @FILE with one key per line; may be repeated.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the rows drawn at random that serve as weak negatives.")
    ] = 0,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a detector to good and bad rows of a gateway's archive, and write it to a file.

    The cross-validated precision and recall are those over the marked rows; they need 5 rows of each kind.
    """
    from orbithash.cluster.detection.fit import fit_to_keys, read_keys, summary, write_detector

    keys = read_keys("--good", good), read_keys("--bad", bad or ())
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        fitted = fit_to_keys(client, *keys, seed=seed)
    write_detector(fitted, out)
    if as_json:
        print_json(summary(fitted) | {"out": str(out)})
        return
    estimate = "too few marks for an estimate of its precision (5 of each kind are needed)"
    if fitted.folds and fitted.recall is not None:
        precision = "undefined" if fitted.precision is None else f"{fitted.precision:.2f}"
        estimate = f"cross-validated over the marked rows: precision {precision}, recall {fitted.recall:.2f}"
    print(f"{out}: from {fitted.num_good} good and {fitted.num_bad} bad rows; {estimate}")


@verbs.command(
    rich_help_panel=ARCHIVE, epilog="Example: orbithash detect archive --detector detector.json --out places.parquet"
)
def detect(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="Archive of codes: a folder or a URI.")],
    detector_: Annotated[Path, typer.Option("--detector", help="File of `orbithash detector` or of the page.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="File to write: .parquet (GeoParquet), .geojson or .csv; replaced if it exists."),
    ],
    min_score: Annotated[
        float, typer.Option("--min-score", help="Smallest score of a row that is found; 0 is the detector's cut-off.")
    ] = 0.0,
    filter_: FilterOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write the rows of an archive that a detector finds, in the order of the archive; no gateway is needed.

    Archives of more than a million rows are read by Ray Data, on all nodes of the cluster.
    """
    from orbithash.cluster.detection.detect import detect as run_detect
    from orbithash.cluster.detection.fit import read_detector

    detection = run_detect(archive, read_detector(detector_), out, min_score, filter_)
    if as_json:
        print_json(detection.to_json())
    else:
        print(detection)
