"""Help of the command line about methods, settings and recipes."""

import json

import pytest
from cluster_parts import TINY

from orbithash.trainers.methods import METHODS
from orbithash.trainers.recipe import shipped_recipes


def test_the_help_lists_verbs_in_groups(cli):
    help_text = cli("--help").out
    groups = {"Learn": "train", "Archive": "encode", "Search": "query", "Cluster": "submit", "Measure": "evaluate"}
    places = [help_text.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)
    for (_, verb), start, end in zip(groups.items(), places, [*places[1:], len(help_text)], strict=True):
        assert f"│ {verb} " in help_text[start:end]


def test_methods_lists_every_method(cli):
    listed = cli("methods")
    assert listed.code == 0
    for name, method in METHODS.items():
        assert f"{name}: learns from {method.learns_from}\n  {method.paper}\n" in listed.out
    fields = json.loads(cli("methods", "--json").out)
    assert [method["name"] for method in fields] == list(METHODS)
    for method in fields:
        kind = METHODS[method["name"]].Config
        shown = [setting["name"] for setting in method["settings"]]
        assert shown == [name for name in kind.model_fields if name not in kind.unused]
    (itq,) = json.loads(cli("methods", "itq", "--json").out)
    assert not {"epochs", "batch_size"} & {setting["name"] for setting in itq["settings"]}


def test_a_setting_has_default_range_and_meaning(cli):
    (method,) = json.loads(cli("methods", "dhcl", "--json").out)
    settings = {setting.pop("name"): setting for setting in method["settings"]}
    field = METHODS["dhcl"].Config.model_fields["margin"]
    assert settings["margin"] == {
        "default": 0.25,
        "allowed": "> 0 and < 1",
        "searched": "0.1:0.4",
        "description": field.description,
    }
    assert settings["lr"]["searched"] == "2e-05:0.001:log"
    assert settings["proxy_loss"]["allowed"] == settings["proxy_loss"]["searched"] == "circle, proxy-anchor"
    assert settings["count_label_bits"]["allowed"] == "true, false"
    assert settings["clip_value"]["allowed"] == "> 0"
    table = cli("methods", "dhcl").out
    assert "tune searches 0.1:0.4" in table
    assert "default 0.25; allowed > 0 and < 1" in table


def test_an_unknown_method(refused):
    refused("methods", "dhlc", words=["unknown method 'dhlc'", "mhcln, dhcl"])
    refused("train", "dhlc", "--help", words=["unknown method 'dhlc'"], prints_help=True)


@pytest.mark.parametrize("verb", ["train", "tune"])
@pytest.mark.parametrize("words", [["duch", "--help"], ["--help", "duch"], ["--data", "mhcln", "duch", "-h"]])
def test_help_of_a_verb_shows_the_settings_of_the_method(cli, verb, words):
    ended = cli(verb, *words)
    assert (ended.code, ended.err) == (0, "")
    assert f"Usage: orbithash {verb}" in ended.out
    assert "Settings of duch, for --set KEY=VALUE and --config:" in ended.out
    assert "near_cosine" in ended.out


def test_methods_lists_every_recipe_once(cli):
    listed = cli("methods").out
    by_method = {method["name"]: method["recipes"] for method in json.loads(cli("methods", "--json").out)}
    assert sorted(recipe["name"] for recipes in by_method.values() for recipe in recipes) == list(shipped_recipes())
    for recipes in by_method.values():
        for recipe in recipes:
            assert listed.count(f"  recipe {recipe['name']}: {recipe['about']}\n") == 1
    (recipe,) = [recipe for recipe in by_method["cdne"] if recipe["name"] == "ucmd-cdne-64"]
    assert recipe["split"] == {"protocol": "cdne", "validation": 0.1}
    assert recipe["settings"] == {"bits": 64, "epochs": 20, "temperature": 0.2}
    assert "protocol=cdne validation=0.1 bits=64 epochs=20 temperature=0.2\n" in cli("methods", "cdne").out


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_a_recipe_that_does_not_exist(refused, labelled, tmp_path, verb):
    refused(
        *(verb, "dhcl", "--data", labelled, "--out", tmp_path / "run", *TINY, "--config", "from-scrach"),
        words=["--config is 'from-scrach': neither a file nor a shipped recipe", ", ".join(shipped_recipes())],
    )
