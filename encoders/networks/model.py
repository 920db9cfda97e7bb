"""The model folder, which training writes and everything else reads.

`model.safetensors` holds the weights, `model.json` everything else; the text encoder of a model with a text side is in
`text_encoder/`. Hashes in `model.json` detect damage. `model_id` is the hash of all that decides codes: an archive
names the model that made its codes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from orbithash.encoders.codes import Encoded, Kind, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder, recover_folder
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.networks.binarizer import Binarizer, Parts
from orbithash.encoders.networks.card import HeadSpec, ModelCard, read_model_folder, write_card
from orbithash.encoders.networks.devices import check_device, exact_float32
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork
from orbithash.encoders.networks.image_features import ImageFeatures
from orbithash.encoders.networks.projection import Projection
from orbithash.encoders.networks.reading import READ_BATCH_SIZE, read_batches
from orbithash.encoders.networks.text import TextEncoder
from orbithash.encoders.networks.text_towers import load_text_encoder

__all__ = ["HashModel"]

# Images per pass of the network. Few on a CPU: the feature maps of many do not fit its caches, and their memory is
# allocated anew in every layer.
BATCH_SIZE = {"cpu": 8, "cuda": 64}

# Rows per pass of a head alone, which is small, and sentences per pass of a text encoder.
FEATURE_BATCH_SIZE = 1024
TEXT_BATCH_SIZE = 32

TEXT_ENCODER = "text_encoder"

Codes = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


class RowsBySlice(Protocol):
    """Rows float32 [N, D], in memory or read from a disk by the slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Features: ...


class HashModel:
    """Trained networks that encode images, and sentences if the model has a text side, as packed binary codes.

    Results do not depend on the batch size or on the other items of the call. `batch_size` of the methods below is the
    number of items that are computed together; it decides speed and memory only. None: 8 images on a CPU, 64 on a GPU.
    On a GPU it is rounded up to whole passes of the network, see `ImageFeatures`.
    """

    def __init__(
        self,
        card: ModelCard,
        network: HashNetwork,
        model_id: str = "",
        device: str | torch.device = "cpu",
        text_head: HashHead | None = None,
        text_encoder: TextEncoder | None = None,
        projection: Projection | None = None,
    ) -> None:
        """Move the networks to `device` (`cpu`, `cuda` or `cuda:N`) and switch them to evaluation mode."""
        assert card.projection == (None if projection is None else projection.spec), "the projection of the card"
        self.card = card
        self.model_id = model_id
        self.network = network
        self.text_head = text_head
        self.projection = projection
        self._text_encoder = text_encoder
        self._place(check_device(device))

    def _place(self, device: torch.device) -> None:
        self.device = device
        self.network = self.network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if self.text_head is not None:
            self.text_head = self.text_head.to(device).eval()
        if self.projection is not None:
            self.projection = self.projection.to(device)
        self._image_features = ImageFeatures(self.network, self.card.preprocessing, self.card.precision, device)
        self._binarizer = Binarizer(self.card, self.network, self.text_head, self.projection, device)

    def to(self, device: str | torch.device) -> Self:
        """Move the model to `cpu`, `cuda` or `cuda:N` and return it; `InputError` for any other device."""
        self._place(check_device(device))
        if self._text_encoder is not None:
            self._text_encoder.to(self.device)
        return self

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return self.card.bits

    @property
    def num_bytes(self) -> int:
        """Number of bytes of a packed code."""
        return num_bytes(self.card.bits)

    @property
    def has_text(self) -> bool:
        """Whether the model encodes sentences."""
        return self.text_head is not None

    @property
    def has_joint_text(self) -> bool:
        """Whether features of images and of sentences are in one space."""
        return self.card.text is not None and self.card.text.is_joint

    @property
    def num_features(self) -> int:
        """Dimensions of a vector that `encode_items` takes: the inputs of the head of images."""
        return self.network.head.num_features

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images before `encode_prepared`."""
        return self.card.preprocessing

    def encode_files(
        self,
        paths: Sequence[Path | str],
        *,
        batch_size: int | None = None,
        root: Path | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Codes:
        """Return codes uint8 [N, num_bytes] of N image files; `InputError` names all files that are refused.

        Args:
            paths: JPEG, PNG, TIFF or JPEG 2000 files, or folders of one TIFF per band.
            batch_size: images per pass of the network.
            root: error messages name paths relative to this folder.
            on_progress: called with the number of images encoded so far.
        """
        files = [Path(path) for path in paths]
        codes = np.empty((len(files), self.num_bytes), np.uint8)
        size, done = self._batch_size(batch_size), 0
        names = files if root is None else [file.relative_to(root) for file in files]
        for batch in read_batches(names, self.preprocessing, root=root, batch_size=max(size, READ_BATCH_SIZE)):
            codes[done : done + len(batch)] = self.encode_prepared(batch, batch_size=size)
            done += len(batch)
            if on_progress is not None:
                on_progress(done)
        return codes

    def encode(self, images: Sequence[Pixels], *, batch_size: int | None = None) -> Codes:
        """Return codes uint8 [N, num_bytes] of rendered images [H, W, C] of any sizes."""
        return self.encode_prepared(self.prepare(images), batch_size=batch_size)

    def prepare(self, images: Sequence[Pixels]) -> Pixels:
        """Return rendered images [H, W, C] of any sizes as prepared images [N, crop, crop, C]."""
        side = self.preprocessing.crop
        prepared = np.empty((len(images), side, side, self.preprocessing.channels), self.preprocessing.dtype)
        for row, image in enumerate(images):
            prepared[row] = self.preprocessing.prepare(image)
        return prepared

    def encode_items(
        self,
        kind: Kind,
        items: Any,
        *,
        with_outputs: bool = False,
        batch_size: int | None = None,
    ) -> Encoded:
        """Return the codes of N items, their stored vectors and, with `with_outputs`, the outputs of the head.

        Vectors are None for a model without a projection, and for sentences whose features are not in the space of
        those of images.

        With outputs, more items are computed twice: of many int8 values, one is often near a rounding boundary.

        Args:
            kind: what the items are.
            items: `image`: prepared images [N, crop, crop, C]; `text`: sentences; `vector`: inputs of the head of
                images, finite float32 [N, num_features].
            with_outputs: return outputs too.
            batch_size: items per pass of the network.

        Raises:
            InputError: items of another shape or type, or sentences for a model without a text side.
        """
        parts = Parts(with_outputs, vectors=True)
        if kind == "text":
            return self._encode_texts(items, batch_size, Parts(with_outputs, self.has_joint_text))
        if kind == "vector":
            vectors = self._check_vectors(items)
            size = self._batch_size(batch_size, FEATURE_BATCH_SIZE)
            return self._binarizer.encode(len(vectors), size, self._rows_of(vectors), parts=parts)
        return self._encode_images(items, batch_size, parts)

    def encode_prepared(self, images: Pixels, *, batch_size: int | None = None) -> Codes:
        """Return codes uint8 [N, num_bytes] of prepared images [N, crop, crop, C]."""
        return self._encode_images(images, batch_size, Parts()).codes

    def features(self, images: Pixels, *, batch_size: int | None = None) -> Features:
        """Return the input of the head, float32 [N, D], for prepared images [N, crop, crop, C]."""
        self._check_prepared(images)
        size = self._image_batch_size(batch_size)
        features = np.empty((len(images), self.network.head.num_features), np.float32)
        with torch.inference_mode(), exact_float32(self.device):
            for start in range(0, len(images), size):
                features[start : start + size] = self._image_features(images[start : start + size]).cpu().numpy()
        return features

    def encode_features(self, features: RowsBySlice, *, batch_size: int | None = None) -> Codes:
        """Return codes uint8 [N, num_bytes] of images from their features float32 [N, D]."""
        size = self._batch_size(batch_size, FEATURE_BATCH_SIZE)
        return self._binarizer.encode(len(features), size, self._rows_of(features), parts=Parts()).codes

    def is_certain(self, features: RowsBySlice) -> npt.NDArray[np.bool_]:
        """Return for which images rounding cannot change code or stored vector, bool [N], from features [N, D]."""
        certain = np.empty(len(features), np.bool_)
        for start in range(0, len(features), FEATURE_BATCH_SIZE):
            rows = slice(start, start + FEATURE_BATCH_SIZE)
            certain[rows] = self._binarizer.is_certain(self._rows_of(features)(rows)).cpu().numpy()
        return certain

    def encode_texts(self, sentences: Sequence[str], *, batch_size: int | None = None) -> Codes:
        """Return codes uint8 [N, num_bytes] of sentences; `InputError` if the model has no text side."""
        return self._encode_texts(sentences, batch_size, Parts()).codes

    def encode_text_features(self, features: Features, *, batch_size: int | None = None) -> Codes:
        """Return codes uint8 [N, num_bytes] of sentences from their features float32 [N, D]."""
        assert self.text_head is not None, "a model with a text side"
        size = self._batch_size(batch_size, FEATURE_BATCH_SIZE)
        return self._binarizer.encode(len(features), size, self._rows_of(features), parts=Parts(), of_text=True).codes

    def normalise(self, images: Pixels | Tensor) -> Tensor:
        """Return prepared images as the network's input, see `reading.Normaliser`."""
        return self._image_features.normalise(images)

    def _batch_size(self, given: int | None, default: int | None = None) -> int:
        if given is None:
            return default or BATCH_SIZE[self.device.type]
        if given < 1:
            raise InputError(f"batch_size is {given}; at least 1 is needed")
        return given

    def _image_batch_size(self, given: int | None) -> int:
        """Return the number of images that are computed together: whole passes, if passes have a fixed size."""
        size, fixed = self._batch_size(given), self._image_features.pass_size or 1
        return -(-size // fixed) * fixed

    def _check_prepared(self, images: Pixels) -> None:
        side, channels, dtype = self.preprocessing.crop, self.preprocessing.channels, self.preprocessing.dtype
        if images.dtype != dtype or images.shape[1:] != (side, side, channels):
            raise InputError(
                f"prepared images are {dtype} [N, {side}, {side}, {channels}], got {images.dtype} {images.shape}"
            )

    def _check_vectors(self, vectors: Any) -> Features:
        dims = self.num_features
        given = np.asarray(vectors)
        if given.dtype != np.float32 or given.ndim != 2 or given.shape[1] != dims:
            raise InputError(f"vectors of this model are float32 [N, {dims}], got {given.dtype} {given.shape}")
        if not np.isfinite(given).all():
            row = int(np.nonzero(~np.isfinite(given).all(axis=1))[0][0])
            raise InputError(f"a vector must be finite; vector {row} of {len(given)} has NaN or infinity")
        return given

    def _rows_of(self, features: RowsBySlice) -> Callable[[slice], Tensor]:
        return lambda rows: torch.tensor(features[rows], device=self.device)

    def _encode_images(self, images: Pixels, batch_size: int | None, parts: Parts) -> Encoded:
        self._check_prepared(images)
        size = self._image_batch_size(batch_size)
        is_fixed = self._image_features.pass_size is not None
        return self._binarizer.encode(
            len(images), size, lambda rows: self._image_features(images[rows]), parts=parts, are_features_fixed=is_fixed
        )

    def _encode_texts(self, sentences: Sequence[str], batch_size: int | None, parts: Parts) -> Encoded:
        encoder = self._text_encoder
        if self.text_head is None or encoder is None:
            raise InputError(
                f"this model ({self.card.method}) encodes images only; train duch with captions, or itq on a "
                "dual encoder such as open_clip:NAME/TAG"
            )

        def features_of(rows: slice) -> Tensor:
            return torch.from_numpy(encoder.encode(sentences[rows])).to(self.device)

        size = self._batch_size(batch_size, TEXT_BATCH_SIZE)
        return self._binarizer.encode(len(sentences), size, features_of, parts=parts, of_text=True)

    def shortened(self, bits: int) -> "HashModel":
        """Return the model of the first `bits` bits, for a head that was trained for nested lengths."""
        card = self.card
        if not bits <= card.network.bits or card.label_code != "none":
            raise InputError(
                f"a prefix of {bits} bits of a model of {card.network.bits} bits and label code {card.label_code!r}; "
                f"at most {card.network.bits} bits without label bits are allowed"
            )

        def shorter(spec: HeadSpec) -> HeadSpec:
            return dataclasses.replace(spec, bits=bits)

        def cut(head: HashHead) -> HashHead:
            short = HashHead(head.num_features, shorter(head.spec))
            state = head.state_dict()
            for name in ("output.weight", "output.bias"):
                state[name] = state[name][:bits]
            short.load_state_dict(state)
            return short

        # Without the classifier: it reads all bits.
        spec = dataclasses.replace(card.network, head=shorter(card.network.head), num_classes=0)
        network = HashNetwork.from_spec(spec)
        network.backbone.load_state_dict(self.network.backbone.state_dict())
        network.head = cut(self.network.head)
        text = None if card.text is None else dataclasses.replace(card.text, head=shorter(card.text.head))
        short_card = dataclasses.replace(card, network=spec, thresholds=card.thresholds[:bits], text=text)
        text_head = None if self.text_head is None else cut(self.text_head)
        return HashModel(short_card, network, "", self.device, text_head, self._text_encoder, self.projection)

    def save(self, folder: Path | str) -> str:
        """Write the model folder and return its `model_id`; a model that is in `folder` is replaced.

        A process that is killed meanwhile leaves the older or the new model for `load`.
        """
        folder = Path(folder)
        recover_folder(folder)
        if folder.exists() and not (folder / "model.json").is_file():
            raise InputError(f"{folder} exists and is not a model folder; choose another path")
        modules = _modules(self.network, self.text_head, self.projection)
        weights = save({k: v.contiguous().cpu() for k, v in modules.state_dict().items()})
        with new_folder(folder) as part:
            (part / "model.safetensors").write_bytes(weights)
            if self._text_encoder is not None:
                self._text_encoder.save(part / TEXT_ENCODER)
            model_id = write_card(self.card, hashlib.sha256(weights).hexdigest(), part)
        self.model_id = model_id
        return model_id

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> Self:
        """Read a model folder; `InputError` if it is missing, damaged, incomplete or of an unknown version.

        `device` is `cpu`, `cuda` or `cuda:N`.
        """
        folder, place = Path(folder), check_device(device)
        card, model_id, weights = read_model_folder(folder)
        network, text_head, text_encoder = HashNetwork.from_spec(card.network), None, None
        if card.text is not None:
            text_head = HashHead(card.text.num_features, card.text.head)
            text_encoder = load_text_encoder(folder / TEXT_ENCODER, device=place)
            if text_encoder.sha256 != card.text.encoder_sha256:
                raise InputError(f"{folder / TEXT_ENCODER}: damaged (its files do not give the hash in model.json)")
        projection = None if card.projection is None else Projection(card.projection)
        try:
            _modules(network, text_head, projection).load_state_dict(load(weights))
        except (SafetensorError, RuntimeError) as err:
            raise InputError(f"{folder}: model.safetensors does not fit the network of model.json") from err
        return cls(card, network, model_id, place, text_head, text_encoder, projection)


def _modules(network: HashNetwork, text_head: HashHead | None, projection: Projection | None) -> nn.ModuleDict:
    modules = {"network": network, "text_head": text_head, "projection": projection}
    return nn.ModuleDict({name: module for name, module in modules.items() if module is not None})
