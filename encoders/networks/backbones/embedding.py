"""The place of a backbone in a model of published embeddings: vectors are the input of the head, without a network."""

from urllib.parse import quote, unquote

from torch import Tensor, nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import Backbone, Request, Source
from orbithash.encoders.networks.backbones.names import InputDefaults
from orbithash.encoders.networks.card import BackboneSpec

__all__ = ["SOURCE", "EmbeddingInput", "embedding_backbone", "parse_embedding"]


class EmbeddingInput(Backbone):
    """No network: the features are the data, which `forward` cannot compute from images."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, images: Tensor) -> Tensor:
        """Raise `InputError`: images have no features here."""
        name = self.spec.name or "an embedding without a name"
        raise InputError(f"this model takes vectors of {self.spec.num_features} dimensions ({name}), and no images")

    def blocks(self) -> list[nn.Module]:
        """Return no blocks."""
        return []


def embedding_backbone(name: str, dims: int, origin: str) -> str:
    """Return the setting `backbone` for an embedding: its name and origin may be empty."""
    return f"embedding:{dims}:{quote(name)}:{origin}"


def parse_embedding(own_name: str, channels: int = 3) -> BackboneSpec:
    """Return the description of an embedding from `embedding_backbone`, without the prefix.

    `channels` is the number of bands that the settings state; it has no effect.
    """
    dims, _, rest = own_name.partition(":")
    name, _, origin = rest.partition(":")
    if not dims.isdecimal():
        raise InputError(f"backbone embedding:{own_name} has no dimensions; it is set by a table of embeddings")
    return BackboneSpec("embedding", unquote(name), {}, "none", "none", channels, int(dims), origin)


def _build(request: Request) -> EmbeddingInput:
    return EmbeddingInput(parse_embedding(request.name, request.channels))


# There are no images; the size is a placeholder.
SOURCE = Source(_build, EmbeddingInput, lambda name, weights: InputDefaults(160))
