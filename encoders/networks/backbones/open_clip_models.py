"""Dual encoders of open_clip: `open_clip:NAME[/TAG]`, `open_clip:FOLDER` or `open_clip:hf-hub:ORG/NAME[@REVISION]`.

The backbone is the image tower with its projection. A folder holds open_clip_config.json and safetensors weights.
"""

import copy
import difflib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import ModelBackbone, Request, Source, TextSide
from orbithash.encoders.networks.backbones.layers import adapt_first_convolution, drop_nothing, set_norm
from orbithash.encoders.networks.backbones.names import InputDefaults
from orbithash.encoders.networks.backbones.weights import origin_of_file, read_safetensors
from orbithash.encoders.networks.card import RANDOM_WEIGHTS, BackboneSpec
from orbithash.encoders.networks.hub import hub_file, licence, one_line, read_json

__all__ = ["SOURCE"]

_CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_HUB = "hf-hub:"

_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class _Found(NamedTuple):
    """A dual encoder.

    Attributes:
        config: of the layers, as in the library's model_configs.
        images: how images are prepared.
        weights: returns the file of its weights, downloaded if necessary; None: random weights.
        tokenizer: the name with which the library finds its tokenizer.
        origin: where the weights come from.
        licence: licence of the weights as their source states it.
    """

    config: dict[str, Any]
    images: dict[str, Any]
    weights: Callable[[], Path] | None
    tokenizer: str
    origin: str
    licence: str


def _build(request: Request) -> ModelBackbone:
    found = _find(request.name, request.weights)
    config = copy.deepcopy(found.config)
    if request.pooling not in ("auto", "own"):
        raise InputError(f"pooling is {request.pooling!r}; networks of open_clip have their own: use pooling=auto")
    if request.image_size is not None:
        config["vision_cfg"]["image_size"] = request.image_size
    if found.weights is not None and request.read_weights:
        visual = _load(config, found.weights(), request.name).visual
    else:
        visual = _image_tower(config)
    if request.channels != 3:
        adapt_first_convolution(visual, request.channels, request.rgb, is_pretrained=found.weights is not None)
    norm = set_norm(visual, request.norm)
    drop_nothing(visual)
    spec = BackboneSpec(
        source="open_clip",
        name=Path(request.name).name if Path(request.name).is_dir() else request.name,
        config={key: config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in config},
        pooling="own",
        norm=norm,
        channels=request.channels,
        num_features=int(config["embed_dim"]),
        origin=found.origin,
        licence=found.licence,
    )
    return ModelBackbone(visual, spec, _fixed_side(spec))


def _rebuild(spec: BackboneSpec) -> ModelBackbone:
    visual = _image_tower(spec.config)
    if spec.channels != 3:
        adapt_first_convolution(visual, spec.channels, None, is_pretrained=False)
    set_norm(visual, spec.norm)
    drop_nothing(visual)
    return ModelBackbone(visual, spec, _fixed_side(spec))


def _fixed_side(spec: BackboneSpec) -> int | None:
    """Return the side of images of open_clip's own networks; those of timm check the size themselves."""
    vision = spec.config["vision_cfg"]
    size = None if vision.get("timm_model_name") else vision.get("image_size", 224)
    return int(size[0]) if isinstance(size, list | tuple) else size


def _defaults(name: str, weights: str | None) -> InputDefaults:
    found = _find(name, weights)
    size = found.config["vision_cfg"].get("image_size", 224)
    interpolation = "bilinear" if found.images.get("interpolation") == "bilinear" else "bicubic"
    mean, std = (tuple(found.images.get(key, ())) for key in ("mean", "std"))
    if not mean or not std:
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        mean, std = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    return InputDefaults(int(size[0] if isinstance(size, list | tuple) else size), mean, std, interpolation)


def _text(name: str, weights: str | None) -> TextSide:
    import open_clip

    found = _find(name, weights)
    _check_text(found.config, name)
    model = _model(found.config) if found.weights is None else _load(found.config, found.weights(), name)
    with _quiet(f"open_clip:{name}: its tokenizer cannot be read"):
        tokenizer = open_clip.get_tokenizer(found.tokenizer)
    return _text_side(model.text, tokenizer, {key: found.config[key] for key in _TEXT_KEYS if key in found.config})


_TEXT_KEYS = ("embed_dim", "text_cfg", "quick_gelu")


def _rebuild_text(config: dict[str, Any], folder: Path) -> TextSide:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config["text_cfg"]
    arguments = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    with _quiet(f"{folder}: the text tower or its tokenizer cannot be read"):
        if (folder / _VOCABULARY).is_file():
            tokenizer = SimpleTokenizer(str(folder / _VOCABULARY), **arguments)
        else:
            tokenizer = HFTokenizer(str(folder), **arguments)
        return _text_side(_text_tower(config), tokenizer, config)


def _text_side(network: nn.Module, tokenizer: Any, config: dict[str, Any]) -> TextSide:
    from open_clip.tokenizer import default_bpe

    def tokenise(sentences: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(sentences)).tolist()
        return ids

    def save_tokenizer(folder: Path) -> None:
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        else:
            shutil.copyfile(default_bpe(), folder / _VOCABULARY)

    return TextSide(network, tokenise, save_tokenizer, config)


SOURCE = Source(_build, _rebuild, _defaults, _text, _rebuild_text)


def _find(name: str, weights: str | None) -> _Found:
    """Return the dual encoder of a name; `InputError` if it is unknown."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    if Path(name).is_dir() or name.startswith(_HUB):
        found = _in_folder(name)
    else:
        model, _, tag = name.partition("/")
        config = open_clip.get_model_config(model)
        if config is None:
            near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() lists all"
            raise InputError(f"open_clip has no network {model!r}, and there is no folder {name!r}; {hint}")
        published = get_pretrained_cfg(model, tag) if tag else {}
        if tag and not published:
            tags = ", ".join(list_pretrained_tags_by_model(model)) or "none"
            raise InputError(f"open_clip has no weights {tag!r} of {model}; there are {tags}")
        if published.get("quick_gelu"):
            config["quick_gelu"] = True
        repository = published.get("hf_hub", "")
        file = (lambda: _download(repository, name)) if tag else None
        found = _Found(config, published, file, model, repository.rpartition("/")[0], "")
    _check(found.config, name)
    if weights == "pretrained":
        if found.weights is None:
            raise InputError(f"open_clip:{name}: write open_clip:{name}/TAG for published weights, or give a file")
    elif weights is not None:
        found = found._replace(weights=lambda: Path(weights), origin=origin_of_file(weights), licence="")
    return found if found.weights is not None else found._replace(origin=RANDOM_WEIGHTS)


def _in_folder(name: str) -> _Found:
    """Return the dual encoder of a folder, or of a repository of the hub."""
    if name.startswith(_HUB):
        repository = name.removeprefix(_HUB)
        content, origin = read_json(hub_file(repository, _CONFIG)), repository
        stated = ""

        def weights() -> Path:
            return hub_file(repository, _WEIGHTS)

        tokenizer = f"{_HUB}{repository.partition('@')[0]}"
    else:
        folder = Path(name)
        content, origin, stated = read_json(folder / _CONFIG), f"folder {folder.name}", licence(folder)

        def weights() -> Path:
            files = [folder / _WEIGHTS, *sorted(folder.glob("*.safetensors"))]
            return next((file for file in files if file.is_file()), files[0])

        tokenizer = f"local-dir:{folder}"
    if not isinstance(content.get("model_cfg"), dict):
        raise InputError(f"{name}: no model of open_clip (it has no {_CONFIG} with the key model_cfg)")
    return _Found(content["model_cfg"], content.get("preprocess_cfg", {}), weights, tokenizer, origin, stated)


def _download(repository: str, name: str) -> Path:
    if not repository:
        raise InputError(
            f"open_clip:{name}: its weights are not on the Hugging Face hub as safetensors; download them and use "
            "`orbithash convert`, then give the file as weights"
        )
    repository, _, file = repository.rpartition("/")
    return hub_file(repository, f"{Path(file).stem}.safetensors" if file else _WEIGHTS)


def _check(config: dict[str, Any], name: str) -> None:
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in config:
            raise InputError(f"open_clip:{name}: its configuration has no {key}")
    if "multimodal_cfg" in config:
        raise InputError(f"open_clip:{name}: CoCa, which generates text, is not supported; give a CLIP or SigLIP")


def _check_text(config: dict[str, Any], name: str) -> None:
    if other := config["text_cfg"].get("hf_model_name"):
        raise InputError(
            f"open_clip:{name}: its text tower is the model {other} of the hub, which is not supported; give a dual "
            "encoder with its own text tower"
        )


@contextmanager
def _quiet(problem: str) -> Iterator[None]:
    """Suppress the library's log, and report its errors as one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except _ERRORS as err:
        if isinstance(err, InputError):
            raise
        raise InputError(f"{problem} ({one_line(err)})") from err
    finally:
        logging.disable(disabled)


def _image_tower(config: dict[str, Any]) -> nn.Module:
    from open_clip.model import _build_vision_tower

    with _quiet("the image tower of open_clip cannot be built"):
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        tower: nn.Module = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
        return tower


def _text_tower(config: dict[str, Any]) -> nn.Module:
    from open_clip.model import _build_text_tower

    tower: nn.Module = _build_text_tower(config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False))
    return tower


def _model(config: dict[str, Any]) -> Any:
    """Return the dual encoder with random weights; its towers are `visual` and `text`."""
    from open_clip.model import CustomTextCLIP

    fields = {key: value for key, value in copy.deepcopy(config).items() if key != "custom_text"}
    fields["vision_cfg"]["timm_model_pretrained"] = False
    with _quiet("the dual encoder of open_clip cannot be built"):
        return CustomTextCLIP(**fields)


def _load(config: dict[str, Any], path: Path, name: str) -> Any:
    """Return the dual encoder with the weights of a safetensors file; `InputError` if they do not fit."""
    from open_clip import load_checkpoint

    _check_text(config, name)
    # Reports a file that is missing or a pickle.
    read_safetensors(path)
    model = _model(config)
    with _quiet(f"{path}: not the weights of backbone open_clip:{name}; give the weights of this backbone"):
        load_checkpoint(model, str(path), strict=True)
    return model
