"""Items of STAC: which asset of an item is its image, what its bands hold, where and when it was taken.

A field of STAC or of one of its extensions that the import of images reads belongs here.
"""
