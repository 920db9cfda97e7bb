"""Build networks and turn images and sentences into codes; read and write model folders.

A backbone, a hash head, a text encoder or a field of `model.json` belongs here.
"""
