"""Labelled images on disk, and the manifests that split them.

A manifest fixes, once, which image is in which part. Everything that trains or evaluates reads the manifest and nothing
else, so no split is ever rebuilt in a second place.

    registry.py     the datasets by name, their class lists, and how a folder is recognised
    layouts.py      what a layout's finder gives back
    classes.py      one folder a class: UCMD, AID, NWPU-RESISC45, EuroSAT, any other
    captions.py     sentences in a Karpathy-style JSON file: UCM-captions, RSICD, a folder of one's own
    pairs.py        two sources of the same places: pairs, generated scenes, DSRSID
    bigearthnet.py  BigEarthNet's patch folders
    protocols.py    who is in which part
    manifest.py     the manifest itself
    make.py         from a folder to a manifest
    wald.py         pairs of sources made of RGB images
"""

from orbithash.trainers.datasets.make import make_manifest, resplit
from orbithash.trainers.datasets.manifest import Image, Manifest
from orbithash.trainers.datasets.protocols import PROTOCOLS, Protocol
from orbithash.trainers.datasets.registry import DATASETS, Dataset, find_items

__all__ = [
    "DATASETS",
    "PROTOCOLS",
    "Dataset",
    "Image",
    "Manifest",
    "Protocol",
    "find_items",
    "make_manifest",
    "resplit",
]
