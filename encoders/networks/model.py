"""The model folder: what training leaves, and what everything else reads.

`model.safetensors` holds the state of the networks, `model.json` everything else; the text encoder of a model that
encodes sentences lies beside them in `text_encoder/`. `model_id` is a hash over all, so a flipped byte anywhere is
found, and an archive can name the very network that made its codes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from orbithash.encoders.codes import num_bytes, pack
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder, recover_folder
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.card import HeadSpec, ModelCard, read_model_folder, write_card
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork, NetworkOutput
from orbithash.encoders.networks.label_codes import label_table
from orbithash.encoders.networks.text import TextEncoder

__all__ = ["HashModel"]

# Images per pass of the network. Few on a CPU: the feature maps of many do not fit its caches, and their memory is
# fetched from the kernel anew in every layer.
BATCH_SIZE = {"cpu": 8, "cuda": 64}

# Rows per pass of a head alone, which is small, and sentences per pass of a text encoder.
FEATURE_BATCH_SIZE = 1024
TEXT_BATCH_SIZE = 32

TEXT_ENCODER = "text_encoder"

# An output nearer to its threshold than this is computed again, alone: the same image gives outputs that differ in the
# last digits when its batch has another size. Far above those differences, far below what makes much work.
MARGIN = 1e-4


class HashModel:
    """Networks ready to encode: images, or sentences, in, packed codes out, the same codes whatever the batch size."""

    def __init__(
        self,
        card: ModelCard,
        network: HashNetwork,
        model_id: str = "",
        device: str = "cpu",
        text_head: HashHead | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.card = card
        self.model_id = model_id
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.text_head = None if text_head is None else text_head.to(self.device).eval()
        self._text_encoder = text_encoder
        mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in _moments(card.preprocessing))
        self._mean, self._std = mean * 255, std * 255
        self._thresholds = torch.tensor(card.thresholds, device=self.device)
        self._labels = np.tile(label_table(card.label_code, len(card.classes)), (1, card.label_weight))

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.card.bits

    @property
    def num_bytes(self) -> int:
        """Bytes of a packed code."""
        return num_bytes(self.card.bits)

    @property
    def preprocessing(self) -> Preprocessing:
        """What an image goes through before `encode_prepared`."""
        return self.card.preprocessing

    def encode(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, num_bytes] of rendered images uint8 [H, W, C] of any sizes."""
        return self.encode_prepared(self.prepare(images))

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
        """Rendered images uint8 [H, W, C] of any sizes as uint8 [N, crop, crop, C]."""
        side = self.preprocessing.crop
        prepared = np.empty((len(images), side, side, self.preprocessing.channels), np.uint8)
        for row, image in enumerate(images):
            prepared[row] = self.preprocessing.prepare(image)
        return prepared

    def encode_prepared(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, num_bytes] of prepared images uint8 [N, crop, crop, C]."""
        self._check_prepared(images)
        size = BATCH_SIZE[self.device.type]
        return self._encode(len(images), size, lambda rows: self.network.hash(self._pool(images[rows])))

    def features(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """What the head sees, float32 [N, D], of prepared images uint8 [N, crop, crop, C]."""
        self._check_prepared(images)
        size = BATCH_SIZE[self.device.type]
        features = np.empty((len(images), self.network.head.num_features), np.float32)
        with torch.inference_mode(), _exact():
            for start in range(0, len(images), size):
                features[start : start + size] = self._pool(images[start : start + size]).float().cpu().numpy()
        return features

    def encode_features(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, num_bytes] of images whose features float32 [N, D] are known."""

        def hash_rows(rows: slice) -> NetworkOutput:
            output: NetworkOutput = self.network.hash(torch.from_numpy(features[rows]).to(self.device))
            return output

        return self._encode(len(features), FEATURE_BATCH_SIZE, hash_rows)

    def encode_texts(self, sentences: Sequence[str]) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, num_bytes] of sentences; `InputError` where the model has no text side."""
        text_head, text_encoder = self.text_head, self._text_encoder
        if text_head is None or text_encoder is None:
            raise InputError(f"this model ({self.card.method}) encodes images only; train a method with captions: duch")

        def hash_rows(rows: slice) -> NetworkOutput:
            features = torch.from_numpy(text_encoder.encode(sentences[rows])).to(self.device)
            return NetworkOutput(text_head(features), None)

        return self._encode(len(sentences), TEXT_BATCH_SIZE, hash_rows)

    def encode_text_features(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, num_bytes] of sentences whose features float32 [N, D] are known."""
        text_head = self.text_head
        assert text_head is not None, "a model with a text side"

        def hash_rows(rows: slice) -> NetworkOutput:
            return NetworkOutput(text_head(torch.from_numpy(features[rows]).to(self.device)), None)

        return self._encode(len(features), FEATURE_BATCH_SIZE, hash_rows)

    def normalise(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """The network's input float32 [N, C, crop, crop], channels last in memory, of uint8 [N, crop, crop, C]."""
        pixels = torch.from_numpy(np.array(images, order="C")).to(self.device).permute(0, 3, 1, 2)
        return (pixels.float() - self._mean) / self._std

    def _pool(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """Features [N, D] of a pass of prepared images, the mean over their orientations."""
        features = []
        for orientation in range(self.preprocessing.orientations):
            view = np.rot90(images, orientation % 4, axes=(1, 2))
            features.append(self.network.features(self.normalise(view if orientation < 4 else view[:, :, ::-1])))
        return torch.stack(features).mean(dim=0)

    def _check_prepared(self, images: npt.NDArray[np.uint8]) -> None:
        side, channels = self.preprocessing.crop, self.preprocessing.channels
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, channels):
            raise InputError(
                f"prepared images are uint8 [N, {side}, {side}, {channels}], got {images.dtype} {images.shape}"
            )

    @torch.inference_mode()
    def _encode(self, num_rows: int, size: int, hash_rows: Callable[[slice], NetworkOutput]) -> npt.NDArray[np.uint8]:
        """Codes of rows 0 .. num_rows - 1, `size` at a time, those near a threshold again, alone."""
        codes = np.empty((num_rows, self.num_bytes), np.uint8)
        with _exact():
            for start in range(0, num_rows, size):
                stop = min(start + size, num_rows)
                output = hash_rows(slice(start, stop))
                bits, labels = self._decide(output)
                for row in self._unsure(output).nonzero()[:, 0].tolist():
                    alone = hash_rows(slice(start + row, start + row + 1))
                    bits[row : row + 1], labels[row : row + 1] = self._decide(alone)
                label_bits = np.empty((stop - start, 0), np.bool_)
                if self._labels.size:
                    label_bits = self._labels[labels.cpu().numpy()]
                codes[start:stop] = pack(np.concatenate([bits.cpu().numpy(), label_bits], axis=1))
        return codes

    def _decide(self, output: NetworkOutput) -> tuple[Tensor, Tensor]:
        bits = output.hashes >= self._thresholds
        if output.logits is None or not self._labels.shape[1]:
            # Nobody asks for the class.
            return bits, torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
        return bits, output.logits.argmax(dim=1)

    def _unsure(self, output: NetworkOutput) -> Tensor:
        """Which rows to compute again, alone: rounding could decide one of their bits."""
        unsure = ((output.hashes - self._thresholds).abs() < MARGIN).any(dim=1)
        if self._labels.shape[1]:
            assert output.logits is not None, "label bits come from a classifier"
            best = output.logits.topk(2, dim=1).values
            unsure |= best[:, 0] - best[:, 1] < MARGIN
        return unsure

    def shortened(self, bits: int) -> "HashModel":
        """The model of the first `bits` bits alone, for a head that was trained for nested lengths."""
        card = self.card
        if not bits <= card.network.bits or card.label_code != "none":
            raise InputError(
                f"{bits} bits of a model of {card.network.bits}, label code {card.label_code!r}: no prefix"
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

        # The classifier reads all bits.
        spec = dataclasses.replace(card.network, head=shorter(card.network.head), num_classes=0)
        network = HashNetwork(spec)
        network.backbone.load_state_dict(self.network.backbone.state_dict())
        network.head = cut(self.network.head)
        text = None if card.text is None else dataclasses.replace(card.text, head=shorter(card.text.head))
        short_card = dataclasses.replace(card, network=spec, thresholds=card.thresholds[:bits], text=text)
        text_head = None if self.text_head is None else cut(self.text_head)
        return HashModel(short_card, network, "", str(self.device), text_head, self._text_encoder)

    def save(self, folder: Path) -> str:
        """Writes the model folder (in place of an older one) and returns its `model_id`.

        The folder appears whole or not at all.
        """
        if folder.exists() and not (folder / "model.json").is_file():
            raise InputError(f"{folder} is there and no model folder; give another place")
        weights = save(
            {k: v.contiguous().cpu() for k, v in _modules(self.network, self.text_head).state_dict().items()}
        )
        with new_folder(folder) as part:
            (part / "model.safetensors").write_bytes(weights)
            if self._text_encoder is not None:
                self._text_encoder.save(part / TEXT_ENCODER)
            model_id = write_card(self.card, hashlib.sha256(weights).hexdigest(), part)
        self.model_id = model_id
        return model_id

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> "HashModel":
        """Reads a model folder; `InputError` when it is absent, damaged, short of a key or of an unknown version."""
        folder = Path(folder)
        recover_folder(folder)
        card, model_id, weights = read_model_folder(folder)
        network, text_head, text_encoder = HashNetwork(card.network), None, None
        if card.text is not None:
            text_head = HashHead(card.text.num_features, card.text.head)
            text_encoder = TextEncoder.load(folder / TEXT_ENCODER, device=device)
            if text_encoder.sha256 != card.text.encoder_sha256:
                raise InputError(f"{folder / TEXT_ENCODER}: damaged (its files do not give the hash in model.json)")
        try:
            _modules(network, text_head).load_state_dict(load(weights))
        except (SafetensorError, RuntimeError) as err:
            raise InputError(f"{folder}: model.safetensors does not fit the network of model.json") from err
        return cls(card, network, model_id, device, text_head, text_encoder)


def _modules(network: HashNetwork, text_head: HashHead | None) -> nn.ModuleDict:
    return nn.ModuleDict({"network": network} if text_head is None else {"network": network, "text_head": text_head})


def _exact() -> AbstractContextManager[None]:
    """TensorFloat-32 would round a thousand times coarser than the margin allows for."""
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    )
    return context


def _moments(preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return preprocessing.mean, preprocessing.std
