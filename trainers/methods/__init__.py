"""The hashing methods by name. A method is one module or package: its settings, losses and network.

No method imports from another: shared losses are in `losses`, other shared parts in `base`, `fine_tuning`, `memory` and
`autoencoder`.

Other packages add methods by entry points of the group "orbithash.methods", see docs/extend/method.md.
"""

from importlib.metadata import entry_points

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

__all__ = ["METHODS", "Batch", "Fitted", "Method", "get_method", "method_names"]

# The group of entry points by which installed packages add methods.
ENTRY_POINTS = "orbithash.methods"

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


def method_names() -> list[str]:
    """Return the names of all methods: those of orbithash, then those of other packages, sorted."""
    return list(dict.fromkeys([*METHODS, *sorted(entry_points(group=ENTRY_POINTS).names)]))


def get_method(name: str) -> type[Method]:
    """Return the method of this name. A method of orbithash hides one of the same name in another package.

    Raises:
        InputError: the name is unknown, two packages have it, or its package cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    entries = list(entry_points(group=ENTRY_POINTS, name=name))
    if not entries:
        raise InputError(f"unknown method {name!r}; there are {', '.join(method_names())}")
    if len({entry.value for entry in entries}) > 1:
        values = " and ".join(entry.value for entry in entries)
        raise InputError(f"the method {name!r} is added twice, by {values}; uninstall one of the packages")
    try:
        method = entries[0].load()
    except Exception as err:
        # Anything may go wrong in the code of another package.
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise InputError(f"the method {name!r} cannot be loaded from {entries[0].value} ({reason})") from err
    if not (isinstance(method, type) and issubclass(method, Method) and getattr(method, "name", None) == name):
        raise InputError(
            f"the method {name!r} must be a subclass of orbithash.trainers.methods.Method with name = {name!r}; "
            f"{entries[0].value} is not"
        )
    return method
