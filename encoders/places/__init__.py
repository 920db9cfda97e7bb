"""Files of places: rows with where they lie, as GeoParquet, GeoJSON or CSV, for other programs.

Writers take rows in portions and keep none of them, so that a file may be larger than the memory, and may be the body
of an HTTP response.
"""
