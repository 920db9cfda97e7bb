"""List the images of a source and decode its items: folders, text lists, tables, STAC, object stores, tiles of scenes.

A new kind of source, a column of a listing or a layout of folders belongs here. Nothing here imports torch.
"""
