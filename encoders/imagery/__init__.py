"""Read images: listings of sources, object stores, formats, bands, tiles, places and dates, up to the pixels a
network takes.

A file format, a limit on images, a stretch or a new kind of source belongs here. Nothing here imports torch.
"""
