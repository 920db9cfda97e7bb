"""Publish a trained model: its model card, and its STAC item, both written into the model folder.

What is known of a run, what the publisher states, and the two files made of both belong here. Transfer to and from the
Hugging Face hub is in `encoders.networks.exchange`.
"""
