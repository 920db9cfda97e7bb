"""An autoencoder that predicts two sources from the first, and soft clusters of its latents: stage 1 of MrHash.

The soft clusters and the target that sharpens them are those of DEC (Xie, Girshick, Farhadi, ICML 2016).
"""

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from orbithash.encoders.networks.hash_network import Standardise

__all__ = ["Autoencoder", "PreTraining", "cluster_centres", "pre_train", "soft_assignment", "target_distribution"]

# Of the layers between the features and the latents.
WIDTHS = (512, 512, 256, 256)

# Rows at a time where nothing is trained.
CHUNK_ROWS = 4096

Features = npt.NDArray[np.float32]


class Autoencoder(nn.Module):
    """Features of the first source float [N, D] to latents [N, L], and latents to both sources again.

    Only the first source is seen: what latents keep of the second is what the first tells of it. Without a second
    source there is one decoder.
    """

    def __init__(self, num_features: int, num_latents: int, num_sources: int) -> None:
        super().__init__()
        widths = (num_features, *WIDTHS, num_latents)
        self.norms = nn.ModuleList(Standardise(num_features) for _ in range(num_sources))
        self.encoder = _layers(widths)
        self.decoders = nn.ModuleList(_layers(widths[::-1]) for _ in range(num_sources))

    def standardise(self, sources: list[Tensor]) -> list[Tensor]:
        """Each source [N, D] in the form that is encoded and decoded; as it is while the norms are not fitted."""
        return [norm(source) for norm, source in zip(self.norms, sources, strict=True)]

    def errors(self, latents: Tensor, sources: list[Tensor]) -> list[Tensor]:
        """The mean squared error, over rows and features, of each standardised source told from these latents."""
        return [F.mse_loss(decoder(latents), source) for decoder, source in zip(self.decoders, sources, strict=True)]

    @torch.no_grad()
    def latents(self, features: Features) -> Tensor:
        """Latents [N, L] of unstandardised features of the first source."""
        like = next(self.parameters())
        return torch.cat(
            [
                self.encoder(self.norms[0](torch.from_numpy(features[start : start + CHUNK_ROWS]).to(like)))
                for start in range(0, max(1, len(features)), CHUNK_ROWS)
            ]
        )


def _layers(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class PreTraining:
    """How the autoencoder is trained before the hash network. `first_weight` is that of the first source's error."""

    epochs: int
    batch_size: int
    lr: float
    halve_epochs: int
    held_out: float
    first_weight: float
    seed: int


def pre_train(autoencoder: Autoencoder, sources: list[Features], settings: PreTraining) -> list[float]:
    """Trains on the sources float32 [N, D] of the training part, and returns each epoch's error on the rows held out.

    The autoencoder is left with the state of the epoch that had the least. No label is seen.
    """
    like = next(autoencoder.parameters())
    rng = np.random.default_rng([settings.seed, len(sources[0])])
    held_out, rows = np.split(rng.permutation(len(sources[0])), [max(1, round(settings.held_out * len(sources[0])))])
    optimizer = Adam(autoencoder.parameters(), lr=settings.lr)

    def error(some: npt.NDArray[np.int64]) -> Tensor:
        inputs = autoencoder.standardise([torch.from_numpy(source[some]).to(like) for source in sources])
        first, *second = autoencoder.errors(autoencoder.encoder(inputs[0]), inputs)
        # Alone, the first source is what matters.
        return second[0] + settings.first_weight * first if second else first

    @torch.no_grad()
    def error_held_out() -> float:
        starts = range(0, len(held_out), CHUNK_ROWS)
        chunks = [held_out[start : start + CHUNK_ROWS] for start in starts]
        return sum(float(error(chunk)) * len(chunk) for chunk in chunks) / len(held_out)

    found: list[float] = []
    best: dict[str, Tensor] = {}
    for epoch in range(settings.epochs):
        optimizer.param_groups[0]["lr"] = settings.lr * 0.5 ** (epoch // settings.halve_epochs)
        order = rng.permutation(rows)
        for start in range(0, len(order), settings.batch_size):
            optimizer.zero_grad()
            error(order[start : start + settings.batch_size]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found.append(error_held_out())
        if found[-1] <= min(found):
            best = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    if best:
        autoencoder.load_state_dict(best)
    optimizer.zero_grad()
    return found


def cluster_centres(latents: Tensor, num_clusters: int, seed: int) -> Tensor:
    """The best of 20 k-means of latents [N, L]: centres [M, L]."""
    from sklearn.cluster import KMeans

    found = KMeans(num_clusters, n_init=20, random_state=seed).fit(latents.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).to(latents)


def soft_assignment(latents: Tensor, centres: Tensor, alpha: float) -> Tensor:
    """Student-t shares q float [N, M], rows of sum 1, of latents [N, L] in clusters around centres [M, L].

    Proportional to (1 + |z - mu|^2 / alpha)^(-(alpha + 1) / 2).
    """
    # Distances from products of the rows would lose what lies close.
    distances = (latents.float()[:, None] - centres.float()).square().sum(dim=2)
    return torch.softmax(-(alpha + 1) / 2 * torch.log1p(distances / alpha), dim=1)


def target_distribution(shares: Tensor, hard: bool = False) -> Tensor:
    """DEC's target p float [N, M] of all training rows' shares q [N, M]: sharper, and fair to small clusters.

    p_ij is proportional to q_ij^2 / sum_i q_ij, rows of sum 1. `hard`: 1 for the nearest centre, 0 for the others.
    """
    if hard:
        return F.one_hot(shares.argmax(dim=1), shares.shape[1]).to(shares)
    weights = shares.square() / shares.sum(dim=0).clamp(min=1e-12)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
