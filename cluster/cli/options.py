"""What several verbs have in common: options."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DEFAULT_ADDRESS",
    "DataOption",
    "JsonOption",
    "ModelOption",
    "SetOption",
    "TimeoutOption",
    "WeightsOption",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"

DataOption = Annotated[Path, typer.Option("--data", help="Folder of images, one folder a class.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ModelOption = Annotated[Path, typer.Option("--model", help="Model folder, RUN/model.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; may be repeated.")]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="Backbone weights: a safetensors file, or torchvision's name.")
]
