"""A local S3 server (moto) in a separate process, and clients of it."""

import os
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


# Prints the port, which the kernel chooses: one that was free a moment ago may be taken.
SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""


@contextmanager
def s3_server():
    """Run the server in the block; yields HOST:PORT."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
        text=True,
    )
    try:
        port = process.stdout.readline().strip()
        assert port, "the S3 server exited"
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


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
