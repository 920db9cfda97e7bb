"""Read images: sources and lists, object stores, file formats, bands, tiles, places and times, up to network inputs.

Code for a file format, a limit of images, a stretch or a kind of source belongs here. Nothing here imports torch.
"""
