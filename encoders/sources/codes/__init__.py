"""Tables of codes that were made elsewhere: their description, their rows as columns of an archive.

What the import of codes reads from a file, and what it refuses, belongs here.
"""
