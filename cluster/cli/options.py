"""Options that several verbs share, and the connection to a gateway that some of them describe."""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbithash.encoders.errors import InputError

if TYPE_CHECKING:
    from orbithash.search.client.client import Client
    from orbithash.trainers.loop.run import Run

__all__ = [
    "ARCHIVE",
    "CLUSTER",
    "DEFAULT_ADDRESS",
    "LEARN",
    "MEASURE",
    "SEARCH",
    "AssetOption",
    "BaseMapOption",
    "CaOption",
    "CaptionsOption",
    "CertKeyOption",
    "CertOption",
    "CodesOption",
    "Connection",
    "DataOption",
    "DatasetOption",
    "FilterOption",
    "GatewayOption",
    "GpusPerWorkerOption",
    "JsonOption",
    "MethodArgument",
    "ReportOption",
    "RunOptions",
    "SetOption",
    "SharedGpusOption",
    "TableOption",
    "TimeoutOption",
    "TokenFileOption",
    "WebHostOption",
    "WeightsOption",
    "local_data",
    "local_model",
    "with_run_options",
]

# Headings of the groups of verbs in `orbithash --help`.
LEARN, ARCHIVE, SEARCH, CLUSTER, MEASURE = "Learn", "Archive", "Search", "Cluster", "Measure"

DEFAULT_ADDRESS = "127.0.0.1:50051"

MethodArgument = Annotated[
    str, typer.Argument(metavar="METHOD", help="Name of a method, such as dhcl; `orbithash methods` lists them.")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="Folder of images: one subfolder per class (also s3://BUCKET/FOLDER), or the layout of a known dataset; "
        "or a data set of `orbithash pack`, NAME.lance or s3://BUCKET/NAME.lance; or a Parquet file of embeddings, or "
        "a folder of them.",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Pretrained weights of the backbone: a safetensors file, a name of torchvision such as IMAGENET1K_V2, or "
        "pretrained for timm. Default: the own weights of hf and torchgeo, else random weights.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Value of one setting, overrides --config; may be repeated."),
]
GpusPerWorkerOption = Annotated[
    float, typer.Option("--gpus-per-worker", help="GPUs of each worker, a whole number; 0 trains on CPUs.")
]
# Of workers that compute with a network and train nothing.
SharedGpusOption = Annotated[
    float,
    typer.Option("--gpus-per-worker", help="GPUs of each worker; a fraction such as 0.25 shares one; 0: CPUs only."),
]

DatasetOption = Annotated[
    str | None,
    typer.Option("--dataset", help="Name of the dataset, such as ucmd. Default: recognised by its class names."),
]
CaptionsOption = Annotated[
    Path | None,
    typer.Option("--captions", help="JSON file of captions in Karpathy's format. Default: no captions."),
]


@dataclass(frozen=True)
class RunOptions:
    """The options of the verbs that train, or prepare training: the split of the data, and the settings."""

    dataset: DatasetOption = None
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="Rule that splits the images into parts, such as mhcln. Default: the recipe's, else the dataset's.",
        ),
    ] = None
    split_seed: Annotated[
        int | None, typer.Option("--split-seed", help="Seed of the split into parts. Default: the recipe's, else 0.")
    ] = None
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            help="Fraction of the training images held out to choose the best epoch, or by tune to score trials; 0 to "
            "0.5, 0: none. Default: the recipe's, else 0.1.",
        ),
    ] = None
    captions: CaptionsOption = None
    bits: Annotated[
        int | None, typer.Option("--bits", help="Length of a code in bits. Default: the method's, usually 64.")
    ] = None
    weights: WeightsOption = None
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            help="YAML file of settings, or the name of a shipped recipe, such as ucmd-dhcl-64; `orbithash methods` "
            "lists them.",
        ),
    ] = None
    settings: SetOption = None

    def make_run(self, method: str, data: str, table: list[str] | None = None) -> "Run":
        """Return the run of a method on the data; see `trainers.loop.run.make_run`."""
        from orbithash.trainers.loop.run import make_run

        return make_run(
            method,
            data,
            self.config,
            self.settings or [],
            dataset=self.dataset,
            protocol=self.protocol,
            split_seed=self.split_seed,
            validation=self.validation,
            captions=self.captions,
            table=table,
            bits=self.bits,
            weights=self.weights,
        )


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `RunOptions` in place of its parameter `options`, which gets their values."""
    signature, shared = inspect.signature(command), inspect.signature(RunOptions).parameters

    @functools.wraps(command)
    def verb(**given: Any) -> None:
        options = RunOptions(**{name: given.pop(name) for name in shared})
        command(**given, options=options)

    own = signature.parameters.values()
    parameters = [each for one in own for each in (shared.values() if one.name == "options" else (one,))]
    # What typer reads.
    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return verb


def _check_report(path: Path | None) -> Path | None:
    """Return the path; raise an error before any work if no page can be written there."""
    if path is None:
        return None
    for module in ("jinja2", "matplotlib"):
        importlib.import_module(module)
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise InputError(f"--report is {path}; the path of an HTML file, such as report.html, is needed")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--report is {path}; {folder} is not a folder that can be written; choose another one")
    return path


ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report", callback=_check_report, help="HTML file to write the report to. Default: no report is written."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Maximum time to wait for the gateway, seconds.")]
TableOption = Annotated[
    list[str] | None,
    typer.Option(
        "--table",
        metavar="ROLE=COLUMN",
        help="Column of a table of embeddings for a role (vector, id, time, lon, lat, label, caption, uri), or "
        "layout=NAME, or name=NAME of the embedding; may be repeated. Default: recognised.",
    ),
]
AssetOption = Annotated[
    str | None,
    typer.Option(
        "--asset",
        help="Key of the asset to read in each STAC item. Default: the visual image, else the best other one.",
    ),
]
CodesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--codes",
        metavar="NAME=VALUE",
        help="What the codes of a Parquet file are, where its footer does not say: bits, order (msb or lsb: the "
        "first bit within a byte), model (id or name), scale of the stored vectors, column (default: code). May be "
        "repeated, or given with commas: bits=64,order=msb,model=NAME.",
    ),
]
FilterOption = Annotated[
    str, typer.Option("--filter", help="Condition on rows in CQL2 text, such as \"label = 'harbor'\".")
]
WebHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--web-host",
        metavar="NAME",
        help="Name under which browsers reach the page, besides localhost and IP addresses; may be repeated.",
    ),
]
BaseMapOption = Annotated[
    str | None,
    typer.Option(
        "--base-map",
        metavar="URL",
        help="Template of map tiles with {z}, {x} and {y}, which browsers load. Default: coastlines only, offline.",
    ),
]

TOKEN_VARIABLE = "ORBITHASH_TOKEN"

GatewayOption = Annotated[str, typer.Option("--address", envvar="ORBITHASH_ADDRESS", help="HOST:PORT of the gateway.")]
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", help=f"File with the client's token; default: {TOKEN_VARIABLE}."),
]
CaOption = Annotated[
    Path | None, typer.Option("--ca", help="Certificates of trusted authorities, PEM; encrypts the connection.")
]
CertOption = Annotated[Path | None, typer.Option("--cert", help="The client's certificate, PEM, for mutual TLS.")]
CertKeyOption = Annotated[Path | None, typer.Option("--cert-key", help="Key of the client's certificate, PEM.")]


def local_data(data: str) -> Path:
    """Return the absolute path of a local folder of images; `InputError` for a URI or a packed data set."""
    from orbithash.encoders.sources.image_roots import image_root, local_folder

    return local_folder(image_root(data), "the images")


def local_model(model: Path | None) -> Path | None:
    """Return the folder of --model; of a model of the hub, hf:ORG/NAME, the one in the local cache."""
    if model is None or not str(model).startswith("hf:"):
        return model
    from orbithash.encoders.networks.exchange import cached_model

    return cached_model(str(model))


@dataclass(frozen=True)
class Connection:
    """The address of a gateway and the client's token and certificates, unchecked."""

    address: str
    timeout_s: float = 10.0
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def client(self) -> "Client":
        """Return a client that has not contacted the gateway yet. Raises `InputError` for invalid options."""
        from orbithash.search.client import Client, Tls
        from orbithash.search.gateway.tokens import read_token

        if not self.timeout_s > 0:
            raise InputError(f"--timeout is {self.timeout_s:g}; give a number of seconds above 0")
        token = read_token(self.token_file) if self.token_file else os.environ.get(TOKEN_VARIABLE) or None
        is_encrypted = any((self.ca, self.certificate, self.key))
        tls = Tls(self.ca, self.certificate, self.key) if is_encrypted else None
        return Client(self.address, self.timeout_s, token=token, tls=tls)
