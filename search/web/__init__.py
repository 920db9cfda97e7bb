"""The web service over a gateway: the page, the JSON door, and their protection.

All it knows comes from `orbithash.v1` through `AsyncClient`. Its processes import neither torch nor ray.
"""
