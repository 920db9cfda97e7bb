"""Methods that other packages add by entry points: found by name, listed, refused in one line if unusable."""

import re

import pytest
from method_parts import write_data

from orbithash.cluster.cli.methods import describe
from orbithash.cluster.experiments.reproduce import reproduce
from orbithash.encoders.errors import InputError
from orbithash.trainers import train
from orbithash.trainers.methods import METHODS, get_method, method_names

MODULE = '''
from orbithash.trainers.methods import Fitted
from orbithash.trainers.methods.label_free.projections import first_features


class Last(Fitted):
    """The last features themselves."""

    name = "last-sign"
    paper = "an example"

    def directions(self, rows):
        """Return the directions of the last features."""
        return first_features(rows.shape[1], rows.shape[1])[-self.config.bits :]


class Nameless(Last):
    name = "another"


NOT_A_CLASS = 5
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Add a package whose entry points are given, `name = module:object`."""

    def add(*lines, package="added_methods"):
        site = tmp_path / package
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}.py").write_text(MODULE)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[orbithash.methods]", *lines, ""]))
        monkeypatch.syspath_prepend(str(site))

    return add


def test_a_method_of_another_package_is_trained_and_listed_like_others(install, tmp_path):
    install("last-sign = added_methods:Last")
    assert method_names() == [*METHODS, "last-sign"]
    assert [method.name for method in describe()] == method_names()
    (described,) = describe("last-sign")
    assert (described.paper, described.learns_from) == ("an example", "images without labels, in one pass")
    data = write_data(tmp_path / "images")
    settings = {"bits": 16, "backbone": "mobilenet_v3_small", "image_size": 32}
    model = train("last-sign", data, tmp_path / "run", **settings)
    # The second call reads the method's name from the run folder.
    assert train("last-sign", data, tmp_path / "run", **settings).model_id == model.model_id


def test_a_method_of_orbithash_hides_another_of_its_name(install):
    install("itq = added_methods:Last")
    assert method_names() == list(METHODS)
    assert get_method("itq") is METHODS["itq"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("broken = added_methods:Absent", "cannot be loaded from added_methods:Absent (AttributeError: "),
        ("broken = absent_module:Method", "cannot be loaded from absent_module:Method (ModuleNotFoundError: "),
        ("broken = added_methods:NOT_A_CLASS", "must be a subclass of orbithash.trainers.methods.Method with name ="),
        ("broken = added_methods:Nameless", "with name = 'broken'; added_methods:Nameless is not"),
    ],
)
def test_an_unusable_method_is_refused_in_one_line(install, entry, problem):
    install(entry)
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        get_method("broken")
    assert "\n" not in str(caught.value)


def test_a_name_that_two_packages_give_is_refused(install):
    install("last-sign = added_methods:Last")
    install("last-sign = other_methods:Last", package="other_methods")
    with pytest.raises(InputError, match=r"added twice, by \w+_methods:Last and \w+_methods:Last; uninstall one"):
        get_method("last-sign")


def test_an_unknown_method_lists_those_of_other_packages(install):
    install("last-sign = added_methods:Last")
    with pytest.raises(InputError, match=r"unknown method 'lost'; there are mhcln, .*, last-sign"):
        get_method("lost")


def test_a_method_without_a_published_evaluation_is_known_but_not_reproduced(install, tmp_path):
    install("last-sign = added_methods:Last")
    with pytest.raises(InputError, match="last-sign: no published evaluation to reproduce"):
        reproduce(["last-sign"], tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"unknown method or recipe 'lost'; there are .*, last-sign and the recipes"):
        reproduce(["lost"], tmp_path, tmp_path / "out")
