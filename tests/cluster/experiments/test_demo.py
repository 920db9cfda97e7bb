"""What the demo says of itself; the demo as a whole is `make demo`."""

from types import SimpleNamespace

import pytest

from orbithash.cluster.experiments.demo import _summary, run_demo
from orbithash.cluster.experiments.demo_report import Asked
from orbithash.encoders.errors import InputError

RUN = SimpleNamespace(manifest=SimpleNamespace(dataset="ucmd", protocol="duch"), method="duch")
HISTORY = [{"images_per_s": 10.0, "seconds": 2.0}]


def one(value):
    return {"ap_min@20": {"expected": value}}


def asked(sentence, took_ms):
    return Asked(image=None, sentence=sentence, answer=None, took_ms=took_ms)


def test_a_model_with_a_text_side_is_summed_up_by_direction():
    metrics = {
        "bits": 64,
        "metrics": {"image->image": one(0.5), "image->text": one(0.6), "text->image": one(0.7)},
        "chance": {"image->image": {"ap_min@20": 0.01}, "image->text": {"ap_min@20": 0.02}},
        "codes": {"image->image": {"distinct": 7}},
    }
    found = _summary(RUN, HISTORY, metrics, {}, [asked(None, 1.0), asked("a harbor", 3.0)], {})
    assert (found["ap_min@20"], found["chance"], found["distinct_codes"]) == (0.5, 0.01, 7)
    assert found["directions"] == {"image->image": 0.5, "image->text": 0.6, "text->image": 0.7}
    assert (found["query"]["p50_ms"], found["query_by_sentence"]["p50_ms"]) == (1.0, 3.0)


def test_a_model_of_images_alone():
    metrics = {"bits": 64, "metrics": one(0.5), "chance": {"ap_min@20": 0.01}, "codes": {"distinct": 7}}
    found = _summary(RUN, HISTORY, metrics, {}, [asked(None, 1.0), asked(None, 3.0)], {})
    assert (found["ap_min@20"], found["query"]["count"]) == (0.5, 2)
    assert "directions" not in found
    assert "query_by_sentence" not in found


def test_captions_without_images_or_weights(tmp_path):
    for data, weights in ((None, "w"), (tmp_path, None)):
        with pytest.raises(InputError, match="give all three"):
            run_demo(tmp_path / "out", data, weights, (), tmp_path / "captions.json")
