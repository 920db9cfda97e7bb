"""Networks that turn images and sentences into codes, and the model folders that hold them.

Backbones, hash heads, text encoders, the fields of `model.json`, and reading images for a network belong here.
"""
