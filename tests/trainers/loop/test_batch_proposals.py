"""The batch size and the number of workers that a refusal proposes are ones that the method takes."""

import re
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.loop.run import Run, check_batch
from orbithash.trainers.methods import METHODS, Fitted, get_method

TRAINED = [name for name, kind in METHODS.items() if not issubclass(kind, Fitted)]


def run_of(method, num_images, **given):
    """A run with this number of training images, or None if the settings are invalid."""
    try:
        config = load_config(get_method(method).Config, image_size=32, **given)
    except InputError:
        return None
    return Run(method, config, types.SimpleNamespace(part=lambda _: range(num_images)), Path("data"))


def is_taken(run, workers):
    """The rule of `check_batch`: each worker has two images or one group of each micro-batch, of the present ones."""
    least = run.config.accumulate * max(get_method(run.method).group_size * workers, 2)
    return least <= run.config.batch_size <= len(run.manifest.part("train"))


@pytest.mark.parametrize("method", TRAINED)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(2, 40),
    workers=st.integers(1, 7),
    accumulate=st.integers(1, 4),
    images=st.integers(2, 60),
    pairs=st.integers(1, 4),
)
def test_what_a_refusal_proposes_is_taken(method, batch, workers, accumulate, images, pairs):
    given = {"accumulate": accumulate} | ({"class_pairs": pairs} if method == "mhcln" else {})
    run = run_of(method, images, batch_size=batch, **given)
    if run is None:
        return
    try:
        check_batch(run, workers)
    except InputError as err:
        message = str(err)
    else:
        assert is_taken(run, workers)
        return
    assert not is_taken(run, workers)
    assert re.search(r"; give --set|; give at most|[;:] add images$", message), message

    runs = {size: run_of(method, images, batch_size=size, **given) for size in range(2, images + 1)}
    taken = [size for size, other in runs.items() if other and is_taken(other, workers)]
    proposed = re.search(r"batch_size=(\d+) or (more|less)", message)
    if proposed is None:
        assert not taken, message
    else:
        assert int(proposed[1]) == (min(taken) if proposed[2] == "more" else max(taken)), message
        check_batch(runs[int(proposed[1])], workers)

    if fewer := re.search(r"at most (\d+) workers", message):
        assert int(fewer[1]) == max(number for number in range(1, workers) if is_taken(run, number))
        check_batch(run, int(fewer[1]))
    else:
        assert not any(is_taken(run, number) for number in range(1, workers))
