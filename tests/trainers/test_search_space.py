"""Search spaces: declared ranges are valid settings, and ranges of users are parsed or refused."""

import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.methods import METHODS, Fitted
from orbithash.trainers.methods.mhcln import MhclnConfig
from orbithash.trainers.search_space import Choice, Linear, Log, declared_space, is_whole, parse_space, plain_space


def ends(dimension):
    return dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not issubclass(kind, Fitted)])
def test_every_declared_value_is_allowed(method):
    config = METHODS[method].Config
    space = declared_space(config)
    assert "lr" in space or method in ("triplet", "classifier")
    assert len(space) >= 3
    for name, dimension in space.items():
        for value in ends(dimension):
            assert getattr(load_config(config, **{name: value}), name) == value
        if not isinstance(dimension, Choice):
            default = config.model_fields[name].default
            assert dimension.low < dimension.high
            assert dimension.low <= default <= dimension.high, f"{name}: the default lies outside of what is searched"
        if isinstance(dimension, Log):
            assert dimension.low > 0


def test_what_users_say():
    space = parse_space(
        MhclnConfig,
        ["lr", "margin=0.1:0.5", "push_weight=1e-4:1e-1:log", "epochs=2:9", "hidden=[8, 4],[16]", "standardise=yes,no"],
    )
    assert space == {
        "lr": Log(1e-5, 1e-3),
        "margin": Linear(0.1, 0.5),
        "push_weight": Log(1e-4, 1e-1),
        "epochs": Linear(2, 9),
        "hidden": Choice(((8, 4), (16,))),
        "standardise": Choice((True, False)),
    }
    assert is_whole(MhclnConfig, "epochs")
    assert is_whole(MhclnConfig, "validation_database"), "a whole number, or null"
    assert not is_whole(MhclnConfig, "margin")
    assert not is_whole(MhclnConfig, "clip_norm")
    assert plain_space(space)["hidden"] == {"choice": [[8, 4], [16]]}
    assert plain_space(space)["lr"] == {"log": [1e-5, 1e-3]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lrr=1:2", "'lrr' is not a setting; allowed are bits"),
        ("beta1", "beta1 declares no range; give one, such as beta1=LOW:HIGH"),
        ("lr=2:1", "not a range"),
        ("lr=0:1:log", "above 0 for a logarithmic range"),
        ("lr=1:2:lag", "not a range"),
        ("lr=0:inf", "not a range"),
        ("lr=1e-5:inf:log", "not a range"),
        ("lr=nan:1", "not a range"),
        ("lr=a:b", "not a range of numbers"),
        ("lr=0.1", "a single value"),
        ("hidden=[1", "not a list of values"),
    ],
)
def test_what_is_no_space(text, words):
    with pytest.raises(InputError) as error:
        parse_space(MhclnConfig, [text])
    assert words in str(error.value)
