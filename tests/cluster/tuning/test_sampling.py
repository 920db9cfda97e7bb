"""Sampling of settings: the first trials, TPE against random sampling, conditions, what Optuna gets."""

import json

import numpy as np
import optuna
import pytest

from orbithash.cluster.tuning import sampling
from orbithash.cluster.tuning.options import asked_space
from orbithash.cluster.tuning.sampling import NUM_FIRST, sample_settings
from orbithash.cluster.tuning.trials import Record
from orbithash.encoders.errors import InputError
from orbithash.trainers.methods.dhcl import DhclConfig
from orbithash.trainers.methods.mhcln import MhclnConfig
from orbithash.trainers.search_space import Choice, Linear, Log, conditions, is_active


def stored(record):
    """Return a record as it is read again: JSON has no tuples."""
    return Record(**json.loads(json.dumps(vars(record))))


def test_the_first_trials():
    config = MhclnConfig(lr=2e-4)
    space = {"lr": Log(1e-4, 1e-2), "margin": Linear(0.1, 1), "hidden": Choice(((8,), (16, 8))), "epochs": Linear(3, 5)}
    given = {"lr": 2e-4, "margin": 0.2, "hidden": (1024, 512), "epochs": 20}
    assert sample_settings(config, space, 0, 0, []) == given
    near = [sample_settings(config, space, number, seed, []) for seed in range(10) for number in (1, 3)]
    for settings in near:
        assert 2e-4 * 0.5**0.25 <= settings["lr"] <= 2e-4 * 50**0.25, "a quarter of the way, in orders of magnitude"
        assert 0.175 <= settings["margin"] <= 0.4
        assert settings["epochs"] in (16, 17)
    assert 2 < sum(settings["hidden"] != given["hidden"] for settings in near) < 10, "one in four"
    records = [Record(0, given, [(20, 0.5)], "", True)]
    for number in (2, 4, NUM_FIRST, NUM_FIRST + 1):
        settings = sample_settings(config, space, number, 0, records)
        assert 1e-4 <= settings["lr"] <= 1e-2
        assert 0.1 <= settings["margin"] <= 1
        assert settings["hidden"] in ((8,), (16, 8))
        assert settings["epochs"] in (3, 4, 5)
        assert settings == sample_settings(config, space, number, 0, list(map(stored, records)))
        assert settings != sample_settings(config, space, number, 1, records)


def score(settings):
    """Return a score that is 0 at lr=1e-3, margin=0.3, hidden=(8,), batch_size=40, and less elsewhere."""
    return -(
        (np.log10(settings["lr"]) + 3) ** 2
        + (4 * (settings["margin"] - 0.3)) ** 2
        + (settings["hidden"] != (8,)) * 0.3
        + ((settings["batch_size"] - 40) / 50) ** 2
    )


def test_tpe_finds_the_optimum_of_a_quadratic_function():
    config = MhclnConfig(lr=1e-5, margin=1, batch_size=90, epochs=2)
    choices = Choice(((8,), (16, 8), (32,)))
    space = {"lr": Log(1e-6, 1e-1), "margin": Linear(0, 1), "hidden": choices, "batch_size": Linear(10, 100)}

    def best(seed):
        records = []
        for number in range(40):
            settings = sample_settings(config, space, number, seed, records)
            records.append(Record(number, settings, [(2, score(settings))], "", True))
        return max(each.scores[-1][1] for each in records)

    def best_of_random(seed):
        rng = np.random.default_rng(seed)
        draws = [
            {
                "lr": 10 ** rng.uniform(-6, -1),
                "margin": rng.uniform(0, 1),
                "hidden": choices.values[rng.integers(3)],
                "batch_size": rng.integers(10, 101),
            }
            for _ in range(40)
        ]
        return max(map(score, draws))

    seeds = range(8)
    found, random = [best(seed) for seed in seeds], [best_of_random(seed) for seed in seeds]
    assert np.mean(found) > np.mean(random) / 2, "less than half as far from the optimum"
    assert best(0) == found[0]


def test_settings_without_effect_keep_their_given_value():
    config = DhclConfig(tune_blocks=3, lora_rank=6)
    assert [when.name for when in conditions(config, "lora_rank")] == ["tune"]
    assert not is_active(config, "tune_blocks", {"tune": "none"})
    assert is_active(config, "tune_blocks", {"tune": "last"})
    space = asked_space(config, ["tune_blocks", "tune=all,last,lora", "lora_rank", "lora_alpha=1,2", "layer_decay"])
    records, kinds = [], set()
    for number in range(24):
        settings = sample_settings(config, space, number, 3, list(map(stored, records)))
        kinds.add(settings["tune"])
        if number:
            assert settings["tune"] == "last" or settings["tune_blocks"] == 3
            assert settings["tune"] == "lora" or (settings["lora_rank"], settings["lora_alpha"]) == (6, 16)
        records.append(Record(number, settings, [(config.epochs, number % 5 / 5)], "", True))
    assert kinds == {"all", "last", "lora"}
    assert {each.settings["tune_blocks"] for each in records if each.settings["tune"] == "last"} & {1, 2, 4}

    declared = asked_space(DhclConfig(), None)
    assert {"tune", "tune_blocks", "layer_decay"} <= set(declared)
    assert not {"lora_rank", "lora_alpha"} & set(declared), "tune=lora is not in the range of tune"
    assert "tune_blocks" not in asked_space(DhclConfig(tune="all"), None)
    assert "lora_rank" in asked_space(DhclConfig(tune="lora"), None)
    with pytest.raises(InputError, match=r"--search lora_rank: it has no effect with tune=all; set tune to lora"):
        asked_space(DhclConfig(), ["lora_rank"])


def test_what_optuna_is_told(monkeypatch):
    config = MhclnConfig(epochs=4)
    space = {"lr": Log(1e-4, 1e-2), "hidden": Choice(((8,), (16, 8)))}
    records = [
        Record(0, {"lr": 1e-4, "hidden": (1024, 512)}, [(2, 0.5), (4, 0.4)], "", True),
        Record(1, {"lr": 1e-3, "hidden": (16, 8)}, [(1, 0.2), (2, 0.3)], "", True),
        Record(2, {"lr": 1e-2, "hidden": (8,)}, [(1, 0.9)], "the loss is nan", True),
        Record(3, {"lr": 2e-3, "hidden": (8,)}),
        Record(4, {"lr": 2e-3, "hidden": (8,)}, [], "", True),
    ]
    studies = []
    create = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **how: studies.append(create(**how)) or studies[-1])
    sample_settings(config, space, 9, 0, [*map(stored, records), Record(9, {"lr": 5e-3, "hidden": (8,)})])
    told = studies[0].get_trials()[: len(records)]
    assert len(studies[0].get_trials()) == len(records) + 1, "the trial that is sampled is not told"
    assert [each.state.name for each in told] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "FAIL"]
    assert [each.value for each in told] == [0.5, 0.3, None, None, None]
    assert [each.params for each in told[:2]] == [{"lr": 1e-4}, {"lr": 1e-3, "hidden": 1}], (
        "given values may be outside"
    )
    assert told[1].intermediate_values == {1: 0.2, 2: 0.3}


def test_trials_side_by_side_are_not_the_same():
    config, space = MhclnConfig(lr=1e-4), {"lr": Log(1e-5, 1e-1)}
    records = [Record(n, {"lr": 10 ** -(5 - n / 2)}, [(20, -abs(3 - n))], "", True) for n in range(NUM_FIRST)]
    ended, running = list(records), list(records)
    for number in range(NUM_FIRST, NUM_FIRST + 6):
        running.append(Record(number, sample_settings(config, space, number, 0, running)))
        ended.append(Record(number, sample_settings(config, space, number, 0, records)))

    def gap(found):
        places = np.sort(np.log([each.settings["lr"] for each in found[NUM_FIRST:]]))
        return np.diff(places).mean()

    assert gap(running) > gap(ended), "running trials count as poor, and their region is left"
    assert sampling.NUM_FIRST < 16, "a search of the default size uses TPE"
