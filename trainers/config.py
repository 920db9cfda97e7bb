"""Typed settings of training, with the same keys in a YAML file and in `--set`; all problems are reported at once."""

import difflib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from orbithash.encoders.codes import MAX_BITS, MIN_BITS
from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering, Values
from orbithash.encoders.networks.backbones.names import (
    MIN_SIDE_PX,
    SPELLINGS,
    check_backbone_name,
    needs_lookup,
    split_name,
)
from orbithash.encoders.networks.backbones.rgb import rgb_channels
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.sources.embeddings.layouts import TableOptions

if TYPE_CHECKING:
    from orbithash.encoders.networks.hash_network import HashNetwork

__all__ = [
    "RECIPE_SECTION",
    "BandNumbers",
    "PathOrName",
    "TrainConfig",
    "explain",
    "load_config",
    "read_config_file",
    "remove_unknown_keys",
]

# Key of a config file whose value holds no settings; see `recipe.py`.
RECIPE_SECTION = "recipe"

# More than the inputs of any head have.
MAX_VECTOR_DIMS = 65_536


def _absolute(value: str) -> str:
    # Paths that cannot be accessed stay unchanged; opening them reports the error.
    with suppress(OSError):
        if value and Path(value).exists():
            return str(Path(value).absolute())
    return value


# A file or folder, or a name that a library knows. Paths that exist become absolute, because workers that read the
# settings later have another current folder.
PathOrName = Annotated[str, AfterValidator(_absolute)]


def _several(value: Any) -> Any:
    # 1e-4 is text in YAML.
    return (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value


# Numbers of bands: one for each band, or one for all.
BandNumbers = Annotated[tuple[float, ...], BeforeValidator(_several)]


# Settings whose defaults are those of the backbone.
_OF_BACKBONE = {"image_size", "interpolation", "bands", "values", "band_mean", "band_std"}


class TrainConfig(BaseModel):
    """Settings of every method; the config of a method adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Settings of this class that have no effect in a method; `orbithash methods` does not list them.
    unused: ClassVar[tuple[str, ...]] = ()

    # Whether `max_rows` also limits the training images, of which a sample is drawn.
    samples_images: ClassVar[bool] = False

    bits: int = Field(64, ge=MIN_BITS, le=MAX_BITS, description="length of a code in bits")
    vector_dims: int = Field(
        64, ge=0, le=MAX_VECTOR_DIMS, description="dimensions of the stored vectors, for rescoring; 0: no vectors"
    )
    backbone: str = Field(
        "mobilenet_v2",
        description=f"a network of torchvision such as resnet18, or {', '.join(SPELLINGS.values())}",
    )
    weights: PathOrName | None = Field(
        None,
        description="a safetensors file, a name of torchvision's weights, or pretrained for timm; null: random "
        "weights, but the own weights of hf, torchgeo, and open_clip with a TAG or FOLDER",
    )
    norm: Literal["auto", "frozen-batch", "group", "batch"] = Field(
        "auto",
        description="normalisation of the backbone; auto: group for random weights of torchvision, else frozen-batch",
    )
    pooling: Literal["auto", "avg", "max", "avg+max", "cls", "mean", "pooler"] = Field(
        "auto",
        description="pooling of the last feature map or of tokens; auto: avg for torchvision, else the network's own",
    )
    bands: tuple[int | str, ...] = Field(
        (),
        description="bands in this order: numbers from 1, or names: of patch folders, of a GeoTIFF's descriptions or "
        "of STAC; empty: RGB",
    )
    values: Values = Field(
        "picture",
        description="what the network gets: picture: 8 bits by stretch; else numbers: raw: as stored; reflectance: by "
        "the metadata's scale and offset, else 1e-4 for integers; decibel: radar in dB; power: linear power, to dB",
    )
    stretch: str = Field(
        "percentile:2:98",
        description="how data of more than 8 bits become pictures: percentile:LO:HI of each image, or range:LO:HI",
    )
    band_scale: BandNumbers = Field(
        (), description="of numbers, one or one per band: value = number * scale + offset; empty: by `values`"
    )
    band_offset: BandNumbers = Field((), description="of numbers, one or one per band, in the unit of the values")
    band_mean: BandNumbers = Field(
        (),
        description="mean of the network's input, one or one per band: of pictures in 0 to 1, of numbers in their "
        "unit; empty: ImageNet's for pictures, those of the training part for numbers",
    )
    band_std: BandNumbers = Field((), description="standard deviation likewise; given with band_mean")
    table: tuple[str, ...] = Field(
        (), description="columns of a table of embeddings as ROLE=COLUMN, and layout=NAME, name=NAME; empty: recognised"
    )
    max_rows: int = Field(
        200_000,
        ge=1,
        le=10**7,
        description="maximum number of rows of a table of embeddings, drawn with the split's seed",
    )
    image_size: int = Field(
        160,
        ge=32,
        le=1024,
        description="side of the network's input in pixels; default: that of the backbone, 160 for torchvision",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="interpolation of resized images; default: that of the backbone"
    )
    # Random crops show objects larger, so that a network trained on them fits images of a larger size (Touvron et al.,
    # "Fixing the train-test resolution discrepancy", NeurIPS 2019), and training is faster than at that size.
    encoding_sizes: tuple[Annotated[int, Field(ge=32, le=1024)], ...] = Field(
        (),
        description="sides in pixels of the network's input in encoding and in tables of features, which are averaged "
        "over the sizes; multiplies the time; empty: image_size",
    )
    orientations: Literal[1, 4, 8] = Field(
        1,
        description="orientations averaged per image: 4 rotations, 8 with mirror images; multiplies the time",
    )
    epochs: int = Field(15, ge=1, le=10_000, description="passes over the training part")
    batch_size: int = Field(32, ge=2, le=65_536, description="images per step over all workers together")
    accumulate: int = Field(
        1, ge=1, le=1024, description="micro-batches per batch; losses are computed for each micro-batch"
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="precision of training: bfloat16 in the backbone; tf32: TensorFloat-32 in all products on a GPU; "
        "weights and losses stay float32, and so do codes",
    )
    encoding_precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="precision of the backbone in features, validation, encoding and serving; the head stays float32; "
        "in bfloat16 on a CPU each image is computed alone, so that its code does not depend on the batch",
    )
    clip_value: float | None = Field(
        10.0, gt=0, description="clip each gradient element to this absolute value; null: no clipping"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="clip the norm of the gradient to this value, after clip_value; null: no clipping"
    )
    min_crop_area: float = Field(0.4, gt=0, le=1, description="smallest share of an image's area in a random crop")
    colour_jitter: float = Field(
        0.0, ge=0, le=1, description="strength of random brightness, contrast, saturation, hue"
    )
    grayscale: float = Field(0.0, ge=0, le=1, description="share of training views converted to grey")
    seed: int = Field(
        0, ge=0, lt=2**31, description="seed of the order of images, the augmentation and the initial weights"
    )
    validate_every: int = Field(1, ge=1, description="epochs between two validations")
    validation_queries: int = Field(
        2000,
        ge=1,
        description="maximum number of validation images that are queries, a sample drawn with the split's seed, the "
        "same in all epochs",
    )
    validation_database: int | None = Field(
        100_000,
        ge=1,
        description="maximum number of training images that validation searches, a sample likewise; null: all",
    )
    checkpoint_every: int = Field(
        1, ge=1, description="epochs between two checkpoints; the last and every validated epoch is always saved"
    )

    _reads_weights: bool = PrivateAttr(True)

    @model_validator(mode="before")
    @classmethod
    def _take_defaults_of_backbone(cls, values: Any) -> Any:
        """Set what is not given of size, bands and statistics of images to what the backbone was trained on."""
        backbone = values.get("backbone") if isinstance(values, dict) else None
        if not isinstance(backbone, str) or not needs_lookup(backbone) or values.keys() >= _OF_BACKBONE:
            return values
        from orbithash.encoders.networks.backbones.build import default_preprocessing

        defaults = default_preprocessing(backbone, values.get("weights"))
        filled = {"image_size": defaults.size, "interpolation": defaults.interpolation, **values}
        if values.keys().isdisjoint(("bands", "values")) and defaults.bands is not None:
            filled |= {"bands": defaults.bands, "values": defaults.values}
        # Statistics belong to the bands.
        bands, stated = filled.get("bands") or (), values.keys() & {"band_mean", "band_std"}
        num_bands = len(bands) if len(bands) > 1 else 3
        is_same_kind = filled.get("values", "picture") == defaults.values
        if not stated and is_same_kind and len(defaults.mean) in (1, num_bands):
            filled |= {"band_mean": defaults.mean, "band_std": defaults.std}
        return filled

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, backbone: str) -> str:
        return check_backbone_name(backbone)

    @field_validator("table")
    @classmethod
    def _check_table(cls, table: tuple[str, ...]) -> tuple[str, ...]:
        TableOptions.parse(table)
        return table

    @property
    def is_of_embeddings(self) -> bool:
        """Whether the data are vectors instead of images."""
        return split_name(self.backbone)[0] == "embedding"

    def preprocessing(self) -> Preprocessing:
        """Return how an image becomes the network's input, in validation and in the model."""
        rendering = Rendering(self.bands or None, self.stretch, self.values, self.band_scale, self.band_offset)
        return self._preprocessing_of(rendering, self.band_mean, self.band_std)

    def preprocessings(self) -> dict[tuple[Literal["image", "second"], str], Preprocessing]:
        """Return the preprocessing of each source of images, by the source and the prefix of its settings."""
        return {("image", ""): self.preprocessing()}

    def _preprocessing_of(self, rendering: Rendering, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
        mean, std = (numbers * rendering.channels if len(numbers) == 1 else numbers for numbers in (mean, std))
        side, *smaller = sorted(self.encoding_sizes or (self.image_size,), reverse=True)
        return Preprocessing(
            rendering, side, side, mean, std, self.orientations, self.interpolation, smaller=tuple(smaller)
        )

    @property
    def channels(self) -> int:
        """Number of bands of the network's input."""
        return self.preprocessing().channels

    @property
    def rgb(self) -> tuple[int, int, int] | None:
        """Channels of red, green and blue, which keep their pretrained filters; None without RGB."""
        return rgb_channels(self.bands or None)

    def without_weights(self) -> Self:
        """Return the same settings, whose networks keep random weights: for a caller that has trained ones."""
        config = self.model_copy()
        config._reads_weights = False
        return config

    def build_network(self, head: HeadSpec, num_classes: int = 0) -> "HashNetwork":
        """Return a network of the backbone with its initial weights and a new head."""
        from orbithash.encoders.networks.backbones.build import build_backbone
        from orbithash.encoders.networks.hash_network import HashNetwork

        backbone = build_backbone(
            self.backbone,
            self.weights,
            norm=self.norm,
            pooling=self.pooling,
            channels=self.channels,
            rgb=self.rgb,
            image_size=self.image_size,
            read_weights=self._reads_weights,
        )
        return HashNetwork(backbone, head, num_classes)

    @model_validator(mode="after")
    def _check_unused(self) -> Self:
        fields = type(self).model_fields
        if given := [name for name in self.unused if getattr(self, name) != fields[name].default]:
            raise ValueError(f"{', '.join(given)} cannot be set: this method does not use it")
        return self

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        if self.values != "picture" and (self.colour_jitter or self.grayscale):
            raise ValueError(
                f"colour_jitter {self.colour_jitter} and grayscale {self.grayscale} change pictures, and values is "
                f"{self.values}; set both to 0"
            )
        if self.channels != 3 and (self.colour_jitter or self.grayscale):
            raise ValueError(
                f"colour_jitter {self.colour_jitter} and grayscale {self.grayscale} need images of three bands, and "
                f"bands has {self.channels}; set both to 0"
            )
        is_torchvision = split_name(self.backbone)[0] == "torchvision"
        if self.weights is not None and self.norm == "group":
            raise ValueError(
                "norm is group, but pretrained weights need batch norm; use norm=frozen-batch or weights=null"
            )
        min_side = MIN_SIDE_PX.get(self.backbone, 0)
        for side in (self.image_size, *self.encoding_sizes):
            if side < min_side:
                key = "image_size" if side == self.image_size else "encoding_sizes"
                raise ValueError(f"{key} is {side}: {self.backbone} needs at least {min_side} pixels")
        if self.norm == "auto" and is_torchvision:
            # The config is frozen; it is only changed here, while it is created.
            object.__setattr__(self, "norm", "group" if self.weights is None else "frozen-batch")
        return self


Config = TypeVar("Config", bound=TrainConfig)


def load_config(kind: type[Config], file: Path | None = None, settings: Sequence[str] = (), **given: Any) -> Config:
    """Return a config from a YAML file, `key=value` settings and keyword values; later sources override earlier ones.

    Values of `settings` are read as YAML, such as `weights=null`, `bits=48` or `label_code=gray`. `lr=1e-4`, which is
    text in YAML, becomes a number too. One `InputError` reports all problems, with the allowed names or values.
    """
    problems: list[str] = []
    values = read_config_file(file) if file else {}
    values.pop(RECIPE_SECTION, None)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            problems.append(f"{setting!r} is not of the form key=value")
            continue
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"{key}: {text!r} is not a YAML value")
    values |= {key: value for key, value in given.items() if value is not None}
    problems += remove_unknown_keys(values, list(kind.model_fields))
    try:
        config = kind.model_validate(values)
    except ValidationError as err:
        problems += [explain(error) for error in err.errors()]
    if problems:
        raise listed(problems, "settings")
    return config


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file; `InputError` for a file that is not of this form."""
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except OSError as err:
        raise InputError(f"{file}: the config file cannot be read ({err.strerror})") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise InputError(f"{file}: not a YAML file") from err
    if not isinstance(values, dict):
        raise InputError(f"{file}: a config file contains keys and values, got {type(values).__name__}")
    return values


def remove_unknown_keys(values: dict[str, Any], known: Sequence[str]) -> list[str]:
    """Remove the keys of `values` that are not known and return one problem for each."""
    problems = []
    for key in [key for key in values if key not in known]:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        problems.append(f"unknown key {key!r}; {hint}")
        del values[key]
    return problems


def explain(error: Any) -> str:
    """Return an error of pydantic as one line."""
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{where} is {error['input']!r}: {message[0].lower()}{message[1:]}" if where else message
