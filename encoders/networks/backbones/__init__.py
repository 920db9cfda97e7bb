"""Backbones: networks that turn images into feature vectors, from torchvision and other libraries, and their weights.

`build.build_backbone` builds one by its name, such as `resnet18`; `build.rebuild_backbone` from the description in a
model folder. One module for each source of backbones belongs here, and what they share.
"""
