"""The summary and the page of the demo; `make demo` runs the whole demo."""

from types import SimpleNamespace

import pytest

from orbithash.cluster.experiments.demo import _summary, run_demo
from orbithash.cluster.experiments.demo_report import Queried, _choice
from orbithash.encoders.errors import InputError

RUN = SimpleNamespace(manifest=SimpleNamespace(dataset="ucmd", protocol="duch"), method="duch")
HISTORY = [{"images_per_s": 10.0, "seconds": 2.0}]


def one(value):
    return {"ap_min@20": {"expected": value}}


def queried(sentence, took_ms):
    return Queried(image=None, sentence=sentence, answer=None, took_ms=took_ms)


def test_a_model_with_a_text_side_is_summed_up_by_direction():
    metrics = {
        "bits": 64,
        "metrics": {"image->image": one(0.5), "image->text": one(0.6), "text->image": one(0.7)},
        "chance": {"image->image": {"ap_min@20": 0.01}, "image->text": {"ap_min@20": 0.02}},
        "codes": {"image->image": {"distinct": 7}},
    }
    found = _summary(RUN, HISTORY, metrics, {}, [queried(None, 1.0), queried("a harbor", 3.0)], {})
    assert (found["ap_min@20"], found["chance"], found["distinct_codes"]) == (0.5, 0.01, 7)
    assert found["directions"] == {"image->image": 0.5, "image->text": 0.6, "text->image": 0.7}
    assert (found["query"]["p50_ms"], found["query_by_sentence"]["p50_ms"]) == (1.0, 3.0)


def test_a_model_of_images_alone():
    metrics = {"bits": 64, "metrics": one(0.5), "chance": {"ap_min@20": 0.01}, "codes": {"distinct": 7}}
    found = _summary(RUN, HISTORY, metrics, {}, [queried(None, 1.0), queried(None, 3.0)], {})
    assert (found["ap_min@20"], found["query"]["count"]) == (0.5, 2)
    assert "directions" not in found
    assert "query_by_sentence" not in found


def test_captions_without_images_or_weights(tmp_path):
    for data, weights in ((None, "w"), (tmp_path, None)):
        with pytest.raises(InputError, match="give all three"):
            run_demo(tmp_path / "out", data, weights, (), tmp_path / "captions.json")


@pytest.mark.parametrize(
    ("method", "record", "text"),
    [
        ("dhcl", {"epoch": 3, "validation/ap_min@20": 0.9}, "epoch 3, the best by ap_min@20 on the validation part"),
        ("dhcl", {"epoch": 4}, "the last epoch, 4: there is no validation part"),
        ("duch", {"epoch": 4, "validation/ap_min@20": 0.9}, "the last epoch, 4: this method uses no labels to choose"),
        ("mrhash", {"epoch": 4}, "the last epoch, 4: this method uses no labels to choose"),
    ],
)
def test_the_page_says_which_epoch_became_the_model(method, record, text):
    assert _choice(SimpleNamespace(method=method), record) == text
