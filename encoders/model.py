"""The model folder: what training leaves, and what everything else reads.

`model.safetensors` holds the network's state, `model.json` everything else. `model_id` is a hash over both, so a
flipped byte in either is found, and an archive can name the very network that made its codes.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from orbithash.encoders.card import ModelCard, read_model_folder, write_card
from orbithash.encoders.codes import num_bytes, pack
from orbithash.encoders.errors import InputError
from orbithash.encoders.label_codes import label_table
from orbithash.encoders.networks import HashNetwork, NetworkOutput
from orbithash.encoders.preprocessing import Preprocessing

__all__ = ["HashModel"]

# Images per pass of the network. Few on a CPU: the feature maps of many do not fit its caches, and their memory is
# fetched from the kernel anew in every layer.
BATCH_SIZE = {"cpu": 8, "cuda": 64}

# An output nearer to its threshold than this is computed again, alone: the same image gives outputs that differ in the
# last digits when its batch has another size. Far above those differences, far below what makes much work.
MARGIN = 1e-4


class HashModel:
    """A network ready to encode: images in, packed codes out, the same codes whatever the batch size."""

    def __init__(self, card: ModelCard, network: HashNetwork, model_id: str = "", device: str = "cpu") -> None:
        self.card = card
        self.model_id = model_id
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in _moments(card.preprocessing))
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
        """Codes uint8 [N, num_bytes] of rendered images uint8 [H, W, 3] of any sizes."""
        side = self.preprocessing.crop
        prepared = np.empty((len(images), side, side, 3), np.uint8)
        for row, image in enumerate(images):
            prepared[row] = self.preprocessing.prepare(image)
        return self.encode_prepared(prepared)

    def encode_prepared(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, num_bytes] of prepared images uint8 [N, crop, crop, 3]."""
        side = self.preprocessing.crop
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise InputError(f"prepared images are uint8 [N, {side}, {side}, 3], got {images.dtype} {images.shape}")
        size = BATCH_SIZE[self.device.type]
        codes = [self._encode_batch(images[start : start + size]) for start in range(0, len(images), size)]
        return np.concatenate(codes) if codes else np.empty((0, self.num_bytes), np.uint8)

    def normalise(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """The network's input float32 [N, 3, crop, crop], channels last in memory, of uint8 [N, crop, crop, 3]."""
        pixels = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2)
        return (pixels.float() - self._mean) / self._std

    @torch.inference_mode()
    def _encode_batch(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        inputs = self.normalise(images)
        # TensorFloat-32 would round a thousand times coarser than the margin allows for.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            output = self.network(inputs)
            bits, labels = self._decide(output)
            for row in self._unsure(output).nonzero()[:, 0].tolist():
                alone = inputs[row : row + 1].contiguous(memory_format=torch.channels_last)
                bits[row : row + 1], labels[row : row + 1] = self._decide(self.network(alone))
        label_bits = self._labels[labels.cpu().numpy()] if self._labels.size else self._labels.reshape(len(images), 0)
        return pack(np.concatenate([bits.cpu().numpy(), label_bits], axis=1))

    def _decide(self, output: NetworkOutput) -> tuple[Tensor, Tensor]:
        bits = output.hashes >= self._thresholds
        if output.logits is None or not self._labels.shape[1]:
            # Nobody asks for the class.
            return bits, torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
        return bits, output.logits.argmax(dim=1)

    def _unsure(self, output: NetworkOutput) -> Tensor:
        """Which images to compute again, alone: rounding could decide one of their bits."""
        unsure = ((output.hashes - self._thresholds).abs() < MARGIN).any(dim=1)
        if self._labels.shape[1]:
            assert output.logits is not None, "label bits come from a classifier"
            best = output.logits.topk(2, dim=1).values
            unsure |= best[:, 0] - best[:, 1] < MARGIN
        return unsure

    def save(self, folder: Path) -> str:
        """Writes the model folder (in place of an older one) and returns its `model_id`.

        The folder appears whole or not at all.
        """
        if folder.exists() and not (folder / "model.json").is_file():
            raise InputError(f"{folder} is there and no model folder; give another place")
        weights = save({k: v.contiguous().cpu() for k, v in self.network.state_dict().items()})
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        (part / "model.safetensors").write_bytes(weights)
        self.model_id = write_card(self.card, hashlib.sha256(weights).hexdigest(), part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        return self.model_id

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> "HashModel":
        """Reads a model folder; `InputError` when it is absent, damaged, short of a key or of an unknown version."""
        folder = Path(folder)
        card, model_id, weights = read_model_folder(folder)
        network = HashNetwork(card.network)
        try:
            network.load_state_dict(load(weights))
        except (SafetensorError, RuntimeError) as err:
            raise InputError(f"{folder}: model.safetensors does not fit the network of model.json") from err
        return cls(card, network, model_id, device)


def _moments(preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return preprocessing.mean, preprocessing.std
