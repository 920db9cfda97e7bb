"""Read images: formats, bands, units, masks, places and outlines, up to the pixels that a network takes.

A file format, a limit on images or a stretch belongs here. Nothing here imports torch.
"""
