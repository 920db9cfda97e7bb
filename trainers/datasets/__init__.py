"""Find labelled images on disk, and split them by manifests.

A manifest records the part of each image. Training and evaluation read only the manifest, so that a split is never
computed in two places.

    registry.py     the datasets by name, and the signs by which a folder is recognised
    layouts.py      the result of a finder
    classes.py      one folder per class: UCMD, AID, NWPU-RESISC45, EuroSAT, any other
    captions.py     sentences in a Karpathy-style JSON file: UCM-captions, RSICD, any folder
    pairs.py        two sources of the same places: pairs, generated scenes, DSRSID
    bigearthnet.py  BigEarthNet version 1: patch folders with their labels
    bigearthnet_v2.py  version 2: patch folders and a table of labels
    protocols.py    how images are assigned to parts
    images.py       the images of a manifest, as columns
    manifest.py     the manifest itself
    hashes.py       hashes of files, read by several threads and remembered between commands
    make.py         from a folder to a manifest
    wald.py         two sources made of RGB images
"""

from orbithash.trainers.datasets.images import Image, Images
from orbithash.trainers.datasets.make import make_manifest, resplit
from orbithash.trainers.datasets.manifest import MANIFEST, Manifest
from orbithash.trainers.datasets.protocols import PROTOCOLS, Protocol
from orbithash.trainers.datasets.registry import DATASETS, Dataset, find_items

__all__ = [
    "DATASETS",
    "MANIFEST",
    "PROTOCOLS",
    "Dataset",
    "Image",
    "Images",
    "Manifest",
    "Protocol",
    "find_items",
    "make_manifest",
    "resplit",
]
