"""A local S3 server (moto) in a separate process, and clients of it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server():
    """Run the server in the block; yields HOST:PORT."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the S3 server exited"
                assert time.monotonic() < deadline, "the S3 server does not listen after 300 s"
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def s3_client(endpoint, *buckets):
    """Return a client of the server, after creating these buckets."""
    client = _client("s3", endpoint)
    for bucket in buckets:
        client.create_bucket(Bucket=bucket)
    return client


@contextmanager
def no_permission(endpoint):
    """Make the server check permissions in the block; yields environment variables of a user without any permission."""
    iam = _client("iam", endpoint)
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    _check_permissions_after(endpoint, "0")
    try:
        yield {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    finally:
        _check_permissions_after(endpoint, "inf")
        iam.delete_access_key(UserName="nobody", AccessKeyId=key["AccessKeyId"])
        iam.delete_user(UserName="nobody")


def _check_permissions_after(endpoint, num_requests):
    """Make the server check permissions after this many more requests ("inf": never)."""
    url, headers = f"http://{endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(url, num_requests.encode(), headers)).close()


def _client(service, endpoint):
    import boto3

    return boto3.client(
        service,
        endpoint_url=f"http://{endpoint}",
        aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        region_name=ENVIRONMENT["AWS_REGION"],
    )
