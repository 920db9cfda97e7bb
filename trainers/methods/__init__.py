"""The hashing methods by name. A method is one module or package: its settings, losses and network.

No method imports from another: shared losses are in `losses`, other shared parts in `base`, `fine_tuning`, `memory` and
`autoencoder`.
"""

from orbithash.encoders.errors import InputError
from orbithash.trainers.methods.base import Batch, Method
from orbithash.trainers.methods.cdne import Cdne
from orbithash.trainers.methods.classifier import Classifier
from orbithash.trainers.methods.csq import Csq
from orbithash.trainers.methods.dhcl import Dhcl
from orbithash.trainers.methods.duch import Duch
from orbithash.trainers.methods.label_free.contrastive import Contrastive
from orbithash.trainers.methods.label_free.fitted import Fitted, Itq, Lsh, PcaSign, Sign
from orbithash.trainers.methods.mhcln import Mhcln
from orbithash.trainers.methods.mrhash import MrHash
from orbithash.trainers.methods.triplet import Triplet

__all__ = ["METHODS", "Batch", "Fitted", "Method", "get_method"]

METHODS: dict[str, type[Method]] = {
    "mhcln": Mhcln,
    "dhcl": Dhcl,
    "cdne": Cdne,
    "csq": Csq,
    "triplet": Triplet,
    "classifier": Classifier,
    "duch": Duch,
    "mrhash": MrHash,
    "contrastive": Contrastive,
    "itq": Itq,
    "pca-sign": PcaSign,
    "lsh": Lsh,
    "sign": Sign,
}


def get_method(name: str) -> type[Method]:
    """Return the method of this name; `InputError` lists the names that exist."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
