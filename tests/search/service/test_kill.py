"""A gateway that is killed during changes: acknowledged changes are there, once, and the archive is intact."""

import contextlib
import random
import subprocess
import sys
import threading
import time

import pytest

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.search.client.client import Client
from orbithash.search.protocol.errors import SearchError
from orbithash.search.protocol.rows import Row

NUM_KILLS = 30
NUM_WRITERS = 3

SERVER = """
import asyncio, sys
from orbithash.encoders.archive.archive import Archive
from orbithash.search.service import maintenance
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.service.service import Target, open_service

# A kill may interrupt maintenance, too.
maintenance._PAUSE_S = 0.05

class NoModel:
    has_text = False
    num_features = 0
    embedding = None
    has_views = False

async def main():
    async def open_backend(target):
        return LocalBackend(Archive.open(target.archive), NoModel(), target.num_shards)
    service = await open_service(open_backend, Target(sys.argv[1], "", 2))
    gateway = await start_gateway(service, "127.0.0.1:0")
    print(gateway.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def write(address, name, states, stop):
    """Upsert and delete until the gateway is gone; record in `states` what was acknowledged and what is open."""
    number = 0
    with Client(address, timeout_s=30) as client:
        while not stop.is_set():
            number += 1
            keys = [f"{name}/{number}/{i}" for i in range(random.Random(number).randint(1, 5))]
            with contextlib.suppress(SearchError, InputError):
                states |= dict.fromkeys(keys, "open")
                client.upsert([Row(key=key, code=b"ab") for key in keys])
                states |= dict.fromkeys(keys, "there")
                states[keys[0]] = "open"
                client.delete(keys[:1])
                states[keys[0]] = "gone"
                continue
            return


@pytest.mark.slow
def test_what_was_acknowledged_survives_every_kill(tmp_path):
    folder = tmp_path / "archive"
    Archive.create(folder, 16, "m" * 32)
    rng = random.Random(0)
    known: dict[str, str] = {}
    for kill in range(NUM_KILLS):
        process = subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
        address = process.stdout.readline().strip()
        stop = threading.Event()
        notes: list[dict[str, str]] = [{} for _ in range(NUM_WRITERS)]
        writers = [
            threading.Thread(target=write, args=(address, f"{kill}/{number}", note, stop))
            for number, note in enumerate(notes)
        ]
        for writer in writers:
            writer.start()
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.wait()
        process.stdout.close()
        stop.set()
        for writer in writers:
            writer.join()
        for note in notes:
            known |= note
        archive = Archive.open(folder)
        _, table = archive.scan(["key"])
        keys = table["key"].to_pylist()
        assert len(keys) == len(set(keys)) == archive.num_rows
        for key in keys:
            assert known[key] in ("there", "open")
        assert {key for key, state in known.items() if state == "there"} <= set(keys)
        # The open changes are decided now.
        known |= {key: "there" if key in set(keys) else "gone" for key, state in known.items() if state == "open"}
    assert sum(state == "there" for state in known.values()) > NUM_KILLS
