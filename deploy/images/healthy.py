#!/usr/bin/env python3
"""Asks a gateway's health service, which wants no token: exit code 0 while it serves.

Kubernetes' own gRPC probe speaks no TLS before version 1.37.
"""

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    """Exit code; what was wrong goes to stderr, from where it gets into the pod's events."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="HOST:PORT; with --ca a host that the certificate names")
    parser.add_argument("--ca", type=Path, help="certificates to know the gateway by, PEM; without: no encryption")
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds to wait for the answer")
    parser.add_argument("--alive", action="store_true", help="any answer will do, also that no shard can be searched")
    asked = parser.parse_args()

    # A proxy of the environment is not for this machine.
    options = [("grpc.enable_http_proxy", 0)]
    if asked.ca is None:
        channel = grpc.insecure_channel(asked.address, options)
    else:
        channel = grpc.secure_channel(asked.address, grpc.ssl_channel_credentials(asked.ca.read_bytes()), options)
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=asked.timeout).status
        except grpc.RpcError as error:
            print(f"{asked.address}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    if asked.alive or status == health_pb2.HealthCheckResponse.SERVING:
        return 0
    print(f"{asked.address}: {name}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
