"""What the tests of serving share: the address of a started gateway, and queries in the background."""

import contextlib
import re
import threading

from cluster_parts import wait_for

from orbithash.search.client.client import Client


def ready_at(process):
    """Wait until a gateway reports that it is ready, and return its address."""
    found = wait_for(lambda: re.search(r"ready at (\S+);", process.err.read_text()), process)
    return found[1]


class Queries:
    """Queries in flight: the number of answers, and each wrong answer or error."""

    def __init__(self):
        self.num_answers, self.failures = 0, []


@contextlib.contextmanager
def queries_in_background(address, code, is_right, num_threads=2):
    """Send the same query from threads for the block; yields `Queries`. `is_right` judges each answer."""
    queries, stop = Queries(), threading.Event()

    def send():
        with Client(address, timeout_s=30) as client:
            while not stop.is_set():
                try:
                    answer = client.search(code=code, k=10)
                    queries.num_answers += 1
                    if not is_right(answer):
                        queries.failures.append(answer)
                except Exception as error:
                    queries.failures.append(error)

    threads = [threading.Thread(target=send) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield queries
    finally:
        stop.set()
        for thread in threads:
            thread.join()
