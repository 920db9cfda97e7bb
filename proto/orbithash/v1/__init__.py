"""The wire format: `search.proto` and the code generated from it by `proto/generate.py`."""
