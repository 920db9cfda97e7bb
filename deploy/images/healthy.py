#!/usr/bin/env python3
"""Check the health of a gateway for the probes of Kubernetes and Docker: exit code 0 while it serves, else 1.

The health service needs no token. Kubernetes' own gRPC probe does not support TLS before version 1.37.
"""

import argparse
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_ANSWERED = "answered"


def main() -> int:
    """Return the exit code; the reason for 1 is printed to stderr, which Kubernetes copies to the pod's events."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="HOST:PORT; with --ca the host must be a name of the certificate")
    parser.add_argument(
        "--ca", type=Path, help="PEM file of the CA that signed the gateway's certificate; no TLS without"
    )
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds to wait for the answer")
    parser.add_argument("--alive", action="store_true", help="accept any answer, also NOT_SERVING")
    parser.add_argument(
        "--start-file", type=Path, help="file that records the first probe and the first answer, for --start-limit"
    )
    parser.add_argument(
        "--start-limit",
        type=float,
        default=0.0,
        help="seconds from the first probe in which a gateway that has never answered counts as alive",
    )
    options = parser.parse_args()

    # A proxy from the environment cannot reach this machine.
    channel_options = [("grpc.enable_http_proxy", 0)]
    if options.ca is None:
        channel = grpc.insecure_channel(options.address, channel_options)
    else:
        credentials = grpc.ssl_channel_credentials(options.ca.read_bytes())
        channel = grpc.secure_channel(options.address, credentials, channel_options)
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=options.timeout).status
        except grpc.RpcError as error:
            if options.start_file is not None and _may_be_starting(options.start_file, options.start_limit):
                return 0
            print(f"{options.address}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    if options.start_file is not None:
        options.start_file.write_text(_ANSWERED)
    if options.alive or status == health_pb2.HealthCheckResponse.SERVING:
        return 0
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    print(f"{options.address}: {name}", file=sys.stderr)
    return 1


def _may_be_starting(file: Path, limit_s: float) -> bool:
    """Return whether the gateway has never answered, and the first probe was less than `limit_s` seconds ago."""
    if not file.exists():
        file.touch()
    return file.read_text() != _ANSWERED and time.time() - file.stat().st_mtime < limit_s


if __name__ == "__main__":
    sys.exit(main())
