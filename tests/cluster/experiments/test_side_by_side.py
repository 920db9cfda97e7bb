"""Runs side by side: order of outcomes, failures of some, and that they do run at the same time."""

import os
import time
from functools import partial

import pytest

from orbithash.cluster.experiments.side_by_side import attempt, num_that_fit, run_side_by_side
from orbithash.encoders.errors import InputError

MAX_WAIT_S = 120


def refuse():
    raise InputError("bits is 7\nmore lines")


def mistake():
    raise AssertionError


@pytest.mark.ray
def test_a_run_that_fails_is_named_and_the_others_end(ray_cluster, tmp_path, capsys):
    # Inside the test, because workers cannot import it.
    def meet(number):
        """Return the process and the number of runs that were there before the time is over."""
        (tmp_path / f"{number}.here").touch()
        end = time.monotonic() + MAX_WAIT_S
        while time.monotonic() < end and len(list(tmp_path.glob("*.here"))) < 2:
            time.sleep(0.01)
        return os.getpid(), len(list(tmp_path.glob("*.here")))

    def refuse():
        raise InputError("bits is 7\nmore lines")

    def end():
        os._exit(1)

    runs = [partial(meet, 0), refuse, partial(meet, 1), end, partial(divmod, 7, 2)]
    names = [f"run {number}" for number in range(5)]
    first, refused, second, ended, last = run_side_by_side(runs, names, 3, 1, 0)
    assert first.result[0] != second.result[0]
    assert (first.result[1], second.result[1]) == (2, 2), "the two were not running at the same time"
    assert refused == (None, "bits is 7")
    assert ended.problem
    assert "\n" not in ended.problem
    assert last == ((3, 1), "")
    messages = capsys.readouterr().err
    assert "run 1: bits is 7\n" in messages
    assert "run 4: trained and evaluated\n" in messages


@pytest.mark.ray
def test_runs_are_as_many_as_the_cluster_has_room_for(ray_cluster):
    # Of its four CPUs.
    assert [num_that_fit(workers, 0) for workers in (1, 2, 3, 9)] == [4, 2, 1, 1]
    assert num_that_fit(1, 1) == 1
    with pytest.raises(InputError, match="--concurrent 3 needs 6 CPUs, the cluster has 4; ask for fewer"):
        run_side_by_side([refuse], ["run"], 3, 2, 0)


def test_errors_of_the_code_are_not_taken_for_a_failed_run():
    assert attempt(refuse).problem == "bits is 7"
    with pytest.raises(AssertionError):
        attempt(mistake)
