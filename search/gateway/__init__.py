"""Serve the engine over gRPC: authentication, limits, decoding of untrusted images, Prometheus metrics."""
