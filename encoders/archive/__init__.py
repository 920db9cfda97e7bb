"""Store codes: the Lance dataset with one row an image, its schema, its commits, and the side table of refused
images.
"""
