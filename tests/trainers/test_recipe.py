"""Shipped recipes: they load, go by name, and reproduce the rows of docs/results/methods.md."""

import re
from pathlib import Path

import pytest
from method_parts import write_data

from orbithash.encoders.errors import InputError
from orbithash.trainers import train
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import PROTOCOLS
from orbithash.trainers.evaluation.published import REPRODUCTIONS
from orbithash.trainers.loop.run import make_run
from orbithash.trainers.methods import METHODS
from orbithash.trainers.recipe import find_recipe, shipped_recipes

DOCS = [Path(__file__).parents[2] / name for name in ("docs/results/methods.md", "README.md")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of a few classes."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_for_its_method(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert recipe.about
    assert "\n" not in recipe.about
    assert recipe.protocol in PROTOCOLS or (recipe.protocol is None and recipe.method in REPRODUCTIONS)
    config = load_config(METHODS[recipe.method].Config, recipe.file)
    # Names of UC Merced's recipes end with the length of the code.
    assert not name.startswith("ucmd-") or name.endswith(f"-{config.bits}")


@pytest.mark.parametrize(
    ("name", "settings", "split"),
    [
        ("ucmd-mhcln-32", {"bits": 32, "image_size": 224}, ("mhcln", 0, 5)),
        (
            "ucmd-dhcl-64",
            {"image_size": 160, "encoding_sizes": (192, 224), "orientations": 4, "epochs": 20, "nested_bits": (16,)},
            ("dhcl", 0, None),
        ),
        ("ucmd-cdne-64", {"epochs": 20, "temperature": 0.2, "variant": "memory-bank"}, ("cdne", 0.1, None)),
        ("ucmd-cdne-momentum-64", {"epochs": 20, "temperature": 0.2, "variant": "momentum"}, ("cdne", 0.1, None)),
        ("ucmd-classifier-64", {"epochs": 20}, ("cdne", 0.1, None)),
        ("ucmd-triplet-64", {"epochs": 20}, ("cdne", 0.1, None)),
        ("ucmd-duch-64", {"epochs": 60, "temperature": 0.3}, ("duch", 0, None)),
        ("ucmd-mrhash-64", {"code_reconstruction_weight": 5, "sources": "both"}, ("mrhash", 0, 3)),
        ("ucmd-mrhash-first-64", {"code_reconstruction_weight": 5, "sources": "first"}, ("mrhash", 0, 3)),
    ],
)
def test_the_settings_of_a_measured_row(name, settings, split):
    recipe = find_recipe(name)
    config = load_config(METHODS[recipe.method].Config, recipe.file)
    assert {key: getattr(config, key) for key in settings} == settings
    assert (recipe.protocol, recipe.validation, recipe.seeds) == split


def test_names_of_recipes_and_methods_differ():
    """The command `reproduce` takes both."""
    assert not set(shipped_recipes()) & set(METHODS)


def test_a_name_is_that_of_the_shipped_recipe(tmp_path, monkeypatch):
    """A file of that name in the current folder is another recipe, and goes by its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "from-scratch").touch()
    assert find_recipe("from-scratch").file == shipped_recipes()["from-scratch"]
    assert find_recipe("./from-scratch").file.samefile(tmp_path / "from-scratch")


def test_a_recipe_sets_settings_and_split(data):
    run = make_run("dhcl", data, "from-scratch", protocol="random")
    assert (run.config.image_size, run.manifest.protocol, run.manifest.validation) == (64, "random", 0.1)
    run = make_run("cdne", data, "ucmd-cdne-momentum-64")
    assert (run.config.variant, run.config.temperature, run.config.epochs) == ("momentum", 0.2, 20)
    assert (run.manifest.protocol, run.manifest.validation, run.manifest.seed) == ("cdne", 0.1, 0)


def test_options_override_a_recipe(data):
    run = make_run(
        "dhcl",
        data,
        "ucmd-dhcl-64",
        ["image_size=32"],
        protocol="random",
        split_seed=3,
        validation=0.2,
        epochs=1,
    )
    assert (run.config.image_size, run.config.epochs, run.config.nested_bits) == (32, 1, (16,))
    assert (run.manifest.protocol, run.manifest.seed, run.manifest.validation) == ("random", 3, 0.2)
    assert make_run("dhcl", data, "ucmd-dhcl-64").manifest.validation == 0


def test_a_file_of_the_user_may_set_the_split(data, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("recipe: {validation: 0.25, split_seed: 4}\nbits: 16\n")
    run = make_run("mhcln", data, file)
    assert (run.manifest.protocol, run.manifest.seed, run.manifest.validation) == ("random", 4, 0.25)
    assert run.config.bits == 16


def test_a_recipe_is_for_its_method(data):
    with pytest.raises(InputError, match="the recipe ucmd-cdne-64 is for cdne, not for dhcl; use cdne"):
        make_run("dhcl", data, "ucmd-cdne-64")


def test_the_python_interface_takes_recipes(data, tmp_path):
    with pytest.raises(InputError, match="the recipe ucmd-cdne-64 is for cdne"):
        train("dhcl", data, tmp_path / "run", config="ucmd-cdne-64")


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_recipes_in_the_documents_exist(file):
    text = file.read_text()
    # A word after --config that is not a path, or the name of a recipe of UC Merced.
    names = {*re.findall(r"--config ([a-z0-9-]+)(?![\w./-])", text), *re.findall(r"`(ucmd-[a-z0-9-]+)", text)}
    assert names <= set(shipped_recipes()), names


def test_every_recipe_for_ucmd_is_in_the_results():
    text = DOCS[0].read_text()
    assert [name for name in shipped_recipes() if name.startswith("ucmd-") and f"`{name}`" not in text] == []
