"""The autoencoder of MrHash, which reconstructs two sources from the first, and soft clusters of its latents.

The soft clusters and the sharpened target distribution are those of DEC (Xie, Girshick, Farhadi, ICML 2016).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from orbithash.encoders.networks.hash_network import Standardise
from orbithash.trainers.data.feature_table import FeatureRows

__all__ = [
    "Autoencoder",
    "PreTraining",
    "cluster_centres",
    "cluster_entropy",
    "pre_train",
    "soft_assignment",
    "target_distribution",
]

# Widths of the layers between features and latents.
WIDTHS = (512, 512, 256, 256)

# Number of rows at a time in inference.
CHUNK_ROWS = 4096


class Autoencoder(nn.Module):
    """Encodes features of the first source, float [N, D], as latents [N, L]; decodes latents into each source.

    The input is the first source only: latents contain of the second source what can be predicted from the first. With
    one source there is one decoder.
    """

    def __init__(self, num_features: int, num_latents: int, num_sources: int) -> None:
        super().__init__()
        widths = (num_features, *WIDTHS, num_latents)
        self.norms = nn.ModuleList(Standardise(num_features) for _ in range(num_sources))
        self.encoder = _layers(widths)
        self.decoders = nn.ModuleList(_layers(widths[::-1]) for _ in range(num_sources))

    def standardise(self, sources: list[Tensor]) -> list[Tensor]:
        """Return each source [N, D] standardised; unchanged as long as the norms are not fitted."""
        return [norm(source) for norm, source in zip(self.norms, sources, strict=True)]

    def errors(self, latents: Tensor, sources: list[Tensor]) -> list[Tensor]:
        """Return the mean squared error, over rows and features, of each standardised source's reconstruction."""
        return [F.mse_loss(decoder(latents), source) for decoder, source in zip(self.decoders, sources, strict=True)]

    @torch.no_grad()
    def latents(self, features: FeatureRows) -> Tensor:
        """Return the latents [N, L] of features of the first source, without standardisation."""
        like = next(self.parameters())
        return torch.cat(
            [
                self.encoder(self.norms[0](torch.from_numpy(features[start : start + CHUNK_ROWS]).to(like)))
                for start in range(0, max(1, len(features)), CHUNK_ROWS)
            ]
        )


def _layers(widths: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class PreTraining:
    """Settings of the autoencoder's training, which precedes that of the hash network.

    `held_out` is the fraction of rows that select the epoch, `first_weight` the weight of the first source's error.
    """

    epochs: int
    batch_size: int
    lr: float
    halve_epochs: int
    held_out: float
    first_weight: float
    seed: int


def pre_train(autoencoder: Autoencoder, sources: Sequence[FeatureRows], settings: PreTraining) -> list[float]:
    """Train on the sources float32 [N, D] of the training part; return each epoch's error on the held-out rows.

    The autoencoder keeps the weights of the epoch with the lowest error. Labels are not used.
    """
    like = next(autoencoder.parameters())
    rng = np.random.default_rng([settings.seed, len(sources[0])])
    held_out, rows = np.split(rng.permutation(len(sources[0])), [max(1, round(settings.held_out * len(sources[0])))])
    optimizer = Adam(autoencoder.parameters(), lr=settings.lr)

    def error(chunk: npt.NDArray[np.int64]) -> Tensor:
        inputs = autoencoder.standardise([torch.from_numpy(source[chunk]).to(like) for source in sources])
        first, *second = autoencoder.errors(autoencoder.encoder(inputs[0]), inputs)
        return second[0] + settings.first_weight * first if second else first

    @torch.no_grad()
    def error_held_out() -> float:
        starts = range(0, len(held_out), CHUNK_ROWS)
        chunks = [held_out[start : start + CHUNK_ROWS] for start in starts]
        return sum(float(error(chunk)) * len(chunk) for chunk in chunks) / len(held_out)

    errors: list[float] = []
    best: dict[str, Tensor] = {}
    for epoch in range(settings.epochs):
        optimizer.param_groups[0]["lr"] = settings.lr * 0.5 ** (epoch // settings.halve_epochs)
        order = rng.permutation(rows)
        for start in range(0, len(order), settings.batch_size):
            optimizer.zero_grad()
            error(order[start : start + settings.batch_size]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        errors.append(error_held_out())
        if errors[-1] <= min(errors):
            best = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    if best:
        autoencoder.load_state_dict(best)
    optimizer.zero_grad()
    return errors


def cluster_centres(latents: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Return the centres [M, L] of latents [N, L], the best of 20 runs of k-means.

    faiss.Kmeans (1.15) is not used: for 1,890 rows around 16 centres, its best of 20 runs has 13 to 17% more error.
    """
    from sklearn.cluster import KMeans

    kmeans = KMeans(num_clusters, n_init=20, random_state=seed).fit(latents.cpu().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(latents)


def soft_assignment(latents: Tensor, centres: Tensor, alpha: float) -> Tensor:
    """Return the soft assignment q float [N, M] of latents z [N, L] to centres mu [M, L]; rows sum to 1.

    q is proportional to the Student-t kernel (1 + |z - mu|^2 / alpha)^(-(alpha + 1) / 2).
    """
    # Not from dot products, which would lose the precision of small distances.
    distances = (latents.float()[:, None] - centres.float()).square().sum(dim=2)
    return torch.softmax(-(alpha + 1) / 2 * torch.log1p(distances / alpha), dim=1)


def target_distribution(shares: Tensor, hard: bool = False) -> Tensor:
    """Return DEC's target p float [N, M] of the soft assignment q [N, M] of all training rows; rows sum to 1.

    p_ij is proportional to q_ij^2 / sum_i q_ij: sharper than q, and normalised by the size of each cluster. With
    `hard`, p is 1 for the nearest centre and 0 for all others.
    """
    if hard:
        return F.one_hot(shares.argmax(dim=1), shares.shape[1]).to(shares)
    weights = shares.square() / shares.sum(dim=0).clamp(min=1e-12)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)


def cluster_entropy(shares: Tensor) -> Tensor:
    """Return the normalised entropy of cluster sizes, each row of shares [N, M] in its largest cluster.

    1: all clusters have the same size; 0: all rows are in one cluster.
    """
    sizes = torch.bincount(shares.argmax(dim=1), minlength=shares.shape[1]) / max(1, len(shares))
    return -torch.xlogy(sizes, sizes).sum() / math.log(shares.shape[1])
