"""The JSON door: the calls of `orbithash.v1` over HTTP, for programs without gRPC."""
