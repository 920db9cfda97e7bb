"""Waiting policy of OpenMP: the threads of torch sleep at barriers, in every verb."""

import os
import re
import subprocess
import sys

import pytest

# Runs a verb that does not import torch, then imports torch as other verbs do.
CODE = """
import sys
from orbithash.cluster.cli.main import main
sys.argv = ["orbithash", "methods", "--help"]
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
import torch
"""


def spin_count(**environment):
    """Return how often a thread polls at a barrier before it sleeps, as the OpenMP library reports when loaded."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**clean, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch was built with another OpenMP library than GNU's")
    return int(found[1])


def test_threads_sleep_at_barriers():
    assert spin_count() == 0


def test_a_policy_set_by_the_user_is_kept():
    assert spin_count(OMP_WAIT_POLICY="ACTIVE") > 0
