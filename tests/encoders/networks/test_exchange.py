"""Models on the hub: what is uploaded, what is downloaded, and what is refused, against a stand-in of the hub."""

import errno
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
from hub_server import Repository
from huggingface_hub import constants

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks import exchange
from orbithash.encoders.networks.card import BackboneSpec, HeadSpec, ModelCard, NetworkSpec, TextSpec, write_card
from orbithash.encoders.networks.exchange import cached_model, parse_hub_name, pull_model, push_model
from orbithash.encoders.networks.text import files_sha256

NAME = "lab/dhcl"


def write_model(folder, weights=b"weights", has_text=False):
    """A model folder whose files are whole; its weights are those of no network. Returns the model_id."""
    folder.mkdir(parents=True, exist_ok=True)
    text = None
    if has_text:
        encoder = folder / "text_encoder"
        encoder.mkdir()
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            (encoder / name).write_text(name)
        card = {"format_version": 1, "pooling": "mean", "max_tokens": 64, "normalise": False}
        card["sha256"] = files_sha256(encoder, card)
        (encoder / "encoder.json").write_text(json.dumps(card))
        text = TextSpec(card["sha256"], 8, HeadSpec(16))
    card = ModelCard(
        method="dhcl",
        network=NetworkSpec(BackboneSpec("torchvision", "resnet8", {}, "avg", "group", 3, 8), HeadSpec(16)),
        thresholds=(0.0,) * 16,
        label_code="none",
        label_weight=1,
        preprocessing=Preprocessing(Rendering(), 32, 32),
        classes=(),
        dataset={},
        metrics={},
        text=text,
    )
    (folder / "model.safetensors").write_bytes(weights)
    model_id = write_card(card, hashlib.sha256(weights).hexdigest(), folder)
    (folder / "README.md").write_text(
        f"---\nlicense: mit\northash: none\norbithash:\n  model_id: {model_id}\n---\n# A model\n"
    )
    return model_id


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "model", has_text=True)
    return tmp_path / "model"


def assert_refused(call, *arguments, match):
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_a_pulled_model_has_the_files_that_were_pushed(hub, model, tmp_path):
    (model / "stac-item.json").write_text("{}")
    (model / "LICENSE").write_text("MIT")
    pushed = files_of(model)
    for name in ("optimizer.pt", "notes.pkl", ".hidden.json", "run.py"):
        (model / name).write_bytes(b"not for the hub")
    sent = push_model(model, NAME)
    repository = hub.repositories[NAME]
    assert repository.at("main") == (sent.commit, pushed)
    assert (repository.visibility, sent.url) == ("private", f"{hub.url}/{NAME}")
    found = pull_model(NAME, tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == pushed
    assert (found.commit, found.model_id, found.num_bytes) == (sent.commit, sent.model_id, sent.num_bytes)
    assert found.num_bytes == sum(map(len, pushed.values()))


def test_a_new_repository_is_public_if_asked_and_an_existing_one_keeps_its_visibility(hub, model):
    push_model(model, NAME, is_public=True)
    assert hub.repositories[NAME].visibility == "public"
    write_model(model, b"other weights")
    (model / "text_encoder").rename(model.parent / "moved")
    second = push_model(model, NAME)
    assert hub.repositories[NAME].visibility == "public"
    assert hub.repositories[NAME].at("main")[0] == second.commit
    assert len(hub.repositories[NAME].commits) == 3


def test_only_files_of_a_model_are_downloaded(hub, model, tmp_path):
    strange = ("pytorch_model.bin", "setup.py", "../up.json", "text_encoder/deeper/a.json", ".env.json", "a b.md")
    hub.repositories[NAME] = Repository({**files_of(model), **dict.fromkeys(strange, b"?")})
    pull_model(NAME, tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(model)
    asked = {path for _, path in hub.requests if "/resolve/" in path}
    assert asked
    assert not any(path.endswith(name) for path in asked for name in strange)


def test_a_revision_is_a_branch_or_a_commit(hub, model, tmp_path):
    first = push_model(model, NAME)
    shutil.rmtree(model)
    other = write_model(model, b"other weights")
    hub.repositories[NAME].branches["trial"] = first.commit
    push_model(model, f"{NAME}@trial")
    assert pull_model(NAME, tmp_path / "main").model_id == first.model_id
    assert pull_model(f"{NAME}@trial", tmp_path / "trial").model_id == other
    assert pull_model(f"hf:{NAME}@{first.commit}", tmp_path / "trial").model_id == first.model_id
    assert_refused(pull_model, f"{NAME}@v9", tmp_path / "none", match=f"{NAME} cannot be downloaded.*no revision 'v9'")
    assert not (tmp_path / "none").exists()


def test_what_the_hub_denies_is_said_in_one_line(hub, model, tmp_path, monkeypatch):
    assert_refused(pull_model, "lab/none", tmp_path / "none", match="no such model, or it is private")
    push_model(model, NAME)
    hub.repositories[NAME].is_gated = True
    assert_refused(
        pull_model, NAME, tmp_path / "none", match=f"gated; accept its conditions at .*{NAME}.*hf auth login"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert_refused(push_model, model, NAME, match="cannot be uploaded.*denies access|cannot be uploaded.*no such model")
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(pull_model, NAME, tmp_path / "none", match="no such model, or it is private")
    assert_refused(push_model, model, NAME, match="a token is needed.*hf auth login")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(pull_model, NAME, tmp_path / "none", match="cannot be downloaded.*check the network")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["dhcl", "lab/", "/dhcl", "a/b/c", "lab/dhcl@", "lab/..", "lab/a b", "lab/a@x@y", ""])
def test_other_names_are_refused(name, tmp_path):
    assert_refused(parse_hub_name, name, match="ORG/NAME")
    assert_refused(pull_model, name, tmp_path / "none", match="ORG/NAME")


def test_a_model_without_a_fitting_card_is_not_pushed(hub, model):
    readme = (model / "README.md").read_text()
    (model / "README.md").unlink()
    assert_refused(push_model, model, NAME, match="no model card.*orbithash card")
    (model / "README.md").write_text(readme.replace("model_id: ", "model_id: f"))
    assert_refused(push_model, model, NAME, match="describes the model f.*write the card again")
    (model / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert_refused(push_model, model, NAME, match="front matter")
    (model / "README.md").write_text("# A card of another program\n")
    (model / "text_encoder" / "vocab.txt").write_text("changed")
    assert_refused(push_model, model, NAME, match="damaged")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "file", ["model.safetensors", "model.json", "text_encoder/vocab.txt", "text_encoder/encoder.json"]
)
def test_a_model_that_is_damaged_on_the_hub_is_refused_and_the_older_one_stays(hub, model, tmp_path, file):
    files = files_of(model)
    hub.repositories[NAME] = Repository({**files, file: files[file][:-3] + b"..."})
    write_model(tmp_path / "here", b"older")
    older = files_of(tmp_path / "here")
    assert_refused(pull_model, NAME, tmp_path / "here", match="not a model that this orbithash can load")
    assert files_of(tmp_path / "here") == older
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_repository_of_another_kind_is_refused_before_a_file_is_downloaded(hub, model, tmp_path, monkeypatch):
    hub.repositories[NAME] = Repository({"config.json": b"{}", "pytorch_model.bin": b"?"})
    assert_refused(pull_model, NAME, tmp_path / "none", match="no model.json and no model.safetensors")
    push_model(model, NAME)
    monkeypatch.setattr(exchange, "MAX_BYTES", 100)
    assert_refused(pull_model, NAME, tmp_path / "none", match="at most 100")
    monkeypatch.undo()
    assert not any("/resolve/" in path for _, path in hub.requests)


def test_an_interrupted_download_leaves_nothing_and_complete_files_are_kept(hub, model, tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    write_model(model, bytes(range(256)) * 4096)
    (model / "text_encoder").rename(tmp_path / "moved")
    push_model(model, NAME)
    hub.cut = {"model.safetensors"}
    with monkeypatch.context() as patch:
        # The user presses Ctrl-C while the library waits before it asks for the rest.
        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull_model(NAME, tmp_path / "pulled")
    assert not list(tmp_path.glob("*pulled*"))
    hub.requests.clear()
    pull_model(NAME, tmp_path / "pulled")
    downloads = [path for verb, path in hub.requests if verb == "GET" and "/resolve/" in path]
    assert [Path(path).name for path in downloads] == ["model.safetensors"]
    assert files_of(tmp_path / "pulled") == files_of(model)


def test_a_full_disk_leaves_nothing(hub, model, tmp_path, monkeypatch):
    push_model(model, NAME)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        assert_refused(pull_model, NAME, tmp_path / "pulled", match="the disk is full; make space")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        assert_refused(pull_model, NAME, tmp_path / "pulled", match="bytes are needed, and 1 are free")
    assert not (tmp_path / "pulled").exists()
    assert not list(tmp_path.glob(".pulled*"))


def test_a_folder_of_something_else_is_not_replaced(hub, model, tmp_path):
    push_model(model, NAME)
    (tmp_path / "thesis").mkdir()
    pull_model(NAME, tmp_path / "thesis")
    shutil.rmtree(tmp_path / "thesis")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    assert_refused(pull_model, NAME, tmp_path / "thesis", match="not a model folder; choose another path")
    assert_refused(pull_model, NAME, tmp_path / "thesis" / "thesis.tex", match="not a model folder")
    assert files_of(tmp_path / "thesis") == {"thesis.tex": b"years of work"}


def test_a_cached_model_needs_no_hub(hub, model, monkeypatch):
    sent = push_model(model, NAME)
    folder = cached_model(f"hf:{NAME}")
    assert files_of(folder) == files_of(model)
    assert folder.name == sent.commit
    num_requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cached_model(NAME) == folder
    assert len(hub.requests) == num_requests
    assert_refused(cached_model, "lab/other", match="not in the local cache")
