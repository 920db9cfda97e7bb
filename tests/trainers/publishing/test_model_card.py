"""The model card: its metadata is that of the hub, its numbers are those of the evaluation, and it shows no folders."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from method_parts import write_data

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import read_model_folder
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers import evaluate, train
from orbithash.trainers.publishing.front_matter import CARD_METRICS
from orbithash.trainers.publishing.statements import LICENCES, Licence, Statements, parse_bbox
from orbithash.trainers.publishing.trained_model import read_trained_model
from orbithash.trainers.publishing.write import write_card

STATED = Statements(
    "Beaches v1.0",
    Licence("cc-by-4.0"),
    provider="Lab of | tests",
    data_licence=Licence("ours, <ask>"),
    bbox=(170, -10, -170, 10),
    dates="2020-01-01/2021-06-30",
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run of two epochs with nested lengths, evaluated."""
    folder = tmp_path_factory.mktemp("publishing")
    data = write_data(folder / "images")
    settings = {"backbone": "resnet8", "image_size": 32, "batch_size": 8, "epochs": 2}
    train("dhcl", data, folder / "run", bits=16, nested_bits=[8], **settings)
    evaluate(folder / "run", baselines=False)
    return folder / "run"


@pytest.fixture
def run(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / "run")


def card_of(run, statements=STATED):
    model = write_card(run, statements)
    return ModelCard.load(model.folder / "README.md")


def metrics_of(run):
    return json.loads((run / "evaluation" / "metrics.json").read_text())


def write_failures(run, **parts):
    """Write the analysis of failures as `orbithash evaluate` does."""
    content = {
        "worst": [
            {
                "key": "beach/beach1|2.png",
                "label": "beach",
                "sentence": None,
                "ap": 0.125,
                "hits": [{"key": "a", "label": "river", "sentence": None, "distance": 3, "relevant": False}],
                "baseline": {"name": "itq", "ap": 0.5},
            }
        ],
        "confused": [{"label": "beach", "nearest": "river", "queries": 1.5, "of": 4, "baseline": None}],
        "bits": {"count": 16, "dead": [3], "limit": 0.9, "correlated": [{"bits": [4, 9], "correlation": -0.97}]}
        | {"num_correlated": 7},
        **parts,
    }
    failures = {"format_version": 1, "model_id": metrics_of(run)["model_id"], "metric": "ap_min@20"}
    (run / "evaluation" / "failures.json").write_text(json.dumps({**failures, "directions": {"": content}}))


def test_the_front_matter_is_read_by_the_hubs_library(run):
    data = card_of(run).data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "cc-by-4.0",
        "orbithash",
        "image-feature-extraction",
    )
    assert {"remote-sensing", "image-retrieval", "dhcl"} <= set(data["tags"])
    assert data["model-index"][0]["name"] == "Beaches v1.0"
    model_id = read_model_folder(run / "model")[1]
    assert data["orbithash"]["model_id"] == model_id
    assert data["orbithash"]["bits"] == 16
    # geoembeddings.org: the required fields, and the allowed values of those that have some.
    assert data["provider"] == "Lab of | tests"
    assert data["embedding_spatial_types"] == ["scene"]
    assert data["embedding_temporal_type"] == ["single-date"]
    assert data["embedding_dimension"] == 16
    assert data["description"]
    assert data["pretraining"]["data_types"] == data["inference"]["data_types"] == ["RGB"]
    assert data["pretraining"]["patch_size"] == data["inference"]["patch_size"] == 32
    assert data["pretraining"]["spatial_extent"] == [170, -10, -170, 10]
    # Random weights have no origin, and a user's folder is no dataset of the hub.
    assert "base_model" not in data
    assert "datasets" not in data


def test_the_metrics_are_those_of_the_evaluation(run):
    metrics = metrics_of(run)
    data = card_of(run).data
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "Beaches v1.0"
    assert [result.metric_type for result in results] == [name for name in CARD_METRICS if name in metrics["metrics"]]
    for result in results:
        values = metrics["metrics"][result.metric_type]
        assert result.metric_value == pytest.approx(values["expected"], abs=5e-5)
        assert result.metric_args["worst_order_of_ties"] == pytest.approx(values["pessimistic"], abs=5e-5)
        assert result.metric_args["best_order_of_ties"] == pytest.approx(values["optimistic"], abs=5e-5)
        assert result.dataset_args["protocol"] == metrics["protocol"] == "random"
        assert result.dataset_args["queries"] == metrics["queries"]
        assert result.dataset_split == "test"
    text = (run / "model" / "README.md").read_text()
    expected = metrics["metrics"]["ap_min@20"]
    row = [f"{value:.4f}" for value in (expected["expected"], expected["pessimistic"], expected["optimistic"])]
    assert f"| `ap_min@20` | {' | '.join(row)} |" in text


def test_the_card_says_what_the_publisher_stated_and_what_nobody_did(run):
    text = card_of(run).text
    assert "| Provider | Lab of \\| tests |" in text
    assert "Licence of the data, as the publisher states it: ours, \\<ask\\>" in text
    assert "Extent (west, south, east, north): 170, -10, -170, 10" in text
    card = card_of(run, Statements())
    assert card.data.license == "unknown"
    assert card.data.to_dict()["model-index"][0]["name"] == "folder-dhcl-16"
    assert card.text.count("not stated") == 6


def test_a_licence_that_the_hub_does_not_know_keeps_its_text(run):
    data = card_of(run, Statements(licence=Licence("Our Licence, Version 2"))).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "our-licence-version-2")
    assert "| Licence | Our Licence, Version 2 (stated by the publisher) |" in (run / "model/README.md").read_text()
    assert all(Licence(name.upper()).hub_id == name for name in LICENCES)


def test_failures_are_shown_and_examples_can_be_left_out(run):
    assert "Not analysed" in card_of(run).text or (run / "evaluation" / "failures.json").exists()
    write_failures(run)
    text = card_of(run).text
    assert "| beach | river | 1.5 of 4 |" in text
    assert "| beach/beach1\\|2.png | beach | 0.125 | river (d = 3) | 0.500 (itq) |" in text
    assert "1 of the 16 bits of the database's codes is dead, the same in all codes: 3." in text
    assert "7 pairs of bits are correlated by at least 0.9, the strongest: 4 and 9 (-0.97)." in text
    text = card_of(run, Statements(has_examples=False)).text
    assert "beach1" not in text
    assert "| beach | river | 1.5 of 4 |" in text


def test_an_evaluation_of_another_model_is_left_out(run):
    path = run / "evaluation" / "metrics.json"
    path.write_text(json.dumps({**metrics_of(run), "model_id": "0" * 32}))
    model = write_card(run, STATED)
    assert model.skipped == ("evaluation is of another model",)
    card = ModelCard.load(run / "model" / "README.md")
    assert "model-index" not in card.data.to_dict()
    assert "The model was not evaluated." in card.text
    assert "Not analysed" in card.text


def test_several_directions_are_told_apart(run):
    metrics = metrics_of(run)
    shared = ("dataset", "protocol", "method", "bits", "model_id")
    directions = ("image->image", "text->image")
    both = {key: value if key in shared else dict.fromkeys(directions, value) for key, value in metrics.items()}
    both["pair_recall"] = {"text->image": {"recall@1": 0.25}}
    (run / "evaluation" / "metrics.json").write_text(json.dumps({**both, "mean_recall": 0.25}))
    card = card_of(run)
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert {result.dataset_config for result in results} == {"random, image->image", "random, text->image"}
    assert "### folder, protocol random, text to image" in card.text
    assert card.text.count("Own pair among the first k: recall@1 0.250.") == 1


def test_a_card_is_the_same_each_time_and_changes_no_model(run):
    before = HashModel.load(run / "model")
    write_card(run, STATED)
    files = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    write_card(run, STATED)
    assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == files
    after = HashModel.load(run / "model")
    assert (after.model_id, after.card) == (before.model_id, before.card)
    moved = shutil.copytree(run, run.parent / "moved")
    write_card(moved, STATED)
    assert {path.name: path.read_bytes() for path in (moved / "model").iterdir()} == files


def test_no_folder_of_this_machine_is_published(run):
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings |= {"weights": str(run / "secret-folder" / "weights.safetensors"), "norm": "frozen-batch"}
    path.write_text(yaml.safe_dump(settings))
    write_failures(run)
    write_card(run, STATED)
    for name in ("README.md", "stac-item.json"):
        text = (run / "model" / name).read_text()
        assert "weights.safetensors" in text
        assert "secret-folder" not in text
        assert not re.search(r"[\s\"'`:=(]/(tmp|home|root|work)/", text)


def test_a_shorter_length_has_a_card_of_its_own(run):
    card = write_card(run, STATED, bits=8)
    assert card.folder.name == "model-8"
    assert ModelCard.load(run / "model-8" / "README.md").data.to_dict()["orbithash"]["bits"] == 8
    assert card.skipped == ("evaluation is of another model",)
    with pytest.raises(InputError, match="no model of 12 bits, but of 16"):
        write_card(run, STATED, bits=12)


def test_a_run_that_is_not_complete_or_damaged_has_no_card(run):
    with pytest.raises(InputError, match="not a run folder"):
        read_trained_model(run / "model")
    (run / "evaluation" / "metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics.json: damaged .*evaluate the run again"):
        write_card(run, STATED)
    (run / "evaluation" / "metrics.json").write_text(json.dumps({"model_id": read_model_folder(run / "model")[1]}))
    with pytest.raises(InputError, match=r"metrics.json: damaged .*evaluate the run again"):
        write_card(run, STATED)
    (run / "model").rename(run / "moved")
    with pytest.raises(InputError, match="not complete"):
        write_card(run, STATED)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "7 models", "a letter first"),
        ("name", "a/b", "letters, digits"),
        ("provider", "two\nlines", "one line"),
        ("licence", Licence("x" * 1001), "at most 1000"),
        ("bbox", (0, 10, 5, -10), "WEST,SOUTH"),
        ("bbox", (0, 0, 400, 1), "WEST,SOUTH"),
        ("bbox", (0, 0, float("nan"), 1), "WEST,SOUTH"),
        ("dates", "2020", "START/END"),
        ("dates", "2021-01-01/2020-01-01", "START/END"),
        ("dates", "yesterday/today", "START/END"),
    ],
)
def test_statements_are_checked(field, value, message):
    with pytest.raises(InputError, match=message):
        Statements(**{field: value})


def test_a_bounding_box_is_four_numbers():
    assert parse_bbox("-10,2.5,3,4") == (-10, 2.5, 3, 4)
    for text in ("", "1,2,3", "1,2,3,x"):
        with pytest.raises(InputError, match="WEST,SOUTH,EAST,NORTH"):
            parse_bbox(text)
