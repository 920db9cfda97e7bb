"""Upload model folders to the Hugging Face hub and download them.

Only the files of a model folder are transferred: JSON, safetensors, the tokenizer of a text encoder, the model card and
licence texts. A model is checked before it is uploaded and after it is downloaded. huggingface_hub keeps complete files
in its cache (`HF_HOME`), so that a repeated command downloads the others only.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder, recover_folder
from orbithash.encoders.networks.card import read_model_folder
from orbithash.encoders.networks.hub import one_line, quiet_hub

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

__all__ = ["RemoteModel", "cached_model", "is_model_folder", "parse_hub_name", "pull_model", "push_model"]

# The files of a model folder, in its root and in `text_encoder/`. None of their types can hold code. The name of a file
# is a plain one, so that it cannot lead out of the folder.
_ROOT_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.(json|safetensors|md|yaml|yml)|LICEN[CS]E(\.txt)?")
_TEXT_FILE = re.compile(r"text_encoder/[A-Za-z0-9_][A-Za-z0-9._-]*\.(json|safetensors|txt|txt\.gz|model|spm|codes)")
_NEEDED = ("model.json", "model.safetensors")

# model.json is read at once, as are the weights, which no known backbone has more of.
MAX_JSON_BYTES, MAX_BYTES = 64 * 2**20, 64 * 2**30

_NAME = re.compile(r"(?:hf:)?(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class RemoteModel:
    """A model on the hub.

    Attributes:
        name: "ORG/NAME".
        commit: hash of the commit.
        url: address of the page.
        model_id: hash of all that decides codes.
        num_bytes: size of all files that were transferred.
    """

    name: str
    commit: str
    url: str
    model_id: str
    num_bytes: int


def parse_hub_name(text: str) -> tuple[str, str | None]:
    """Return name and revision of ORG/NAME or ORG/NAME@REVISION, with or without "hf:"; `InputError` for others."""
    match = _NAME.fullmatch(text)
    if match is None or "--" in match["name"] or ".." in match["name"]:
        raise InputError(f"{text!r} is not the name of a model on the hub; ORG/NAME or ORG/NAME@REVISION is required")
    return match["name"], match["revision"]


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds a model."""
    recover_folder(folder)
    return (folder / "model.json").is_file()


def push_model(folder: Path, name: str, *, is_public: bool = False) -> RemoteModel:
    """Upload a model folder with its card to the hub, in one commit.

    A repository that does not exist is created, private unless `is_public`; an existing one keeps its visibility. The
    token is that of `hf auth login` or `HF_TOKEN`.

    Raises:
        InputError: no or a damaged model, no card, no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    repository, revision = parse_hub_name(name)
    _, model_id, _ = read_model_folder(folder)
    _check_text_encoder(folder)
    if not (folder / "README.md").is_file():
        raise InputError(f"{folder} has no model card (README.md); write it with `orbithash card RUN`")
    if (described := _described_model(folder / "README.md")) not in (model_id, None):
        raise InputError(
            f"{folder / 'README.md'} describes the model {described}, and the folder holds {model_id}; write the card "
            "again with `orbithash card RUN`"
        )
    if get_token() is None:
        raise InputError("a token is needed to upload a model; run `hf auth login`, or set HF_TOKEN")
    files = _own_files(folder)
    if strange := sorted({path.name for path in (folder / "text_encoder").glob("*")} - {Path(f).name for f in files}):
        raise InputError(
            f"{folder / 'text_encoder'}: {strange[0]} is of a type that is not uploaded, because it may hold code"
        )
    api = HfApi()
    with _reported(repository, revision, "uploaded"), quiet_hub():
        api.create_repo(repository, private=not is_public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            revision=revision,
            commit_message=f"Model {model_id}",
        )
    num_bytes = sum((folder / file).stat().st_size for file in files)
    return RemoteModel(repository, commit.oid, f"{api.endpoint}/{repository}", model_id, num_bytes)


def pull_model(name: str, folder: Path) -> RemoteModel:
    """Download a model into a folder, which appears whole or not at all; a model that is there is replaced.

    Raises:
        InputError: no such model or revision, no access, not a model of orbithash, a damaged file, no space, or
            `folder` holds something else.
    """
    recover_folder(folder)
    if folder.exists() and not (folder.is_dir() and (is_model_folder(folder) or not any(folder.iterdir()))):
        raise InputError(f"{folder} exists and is not a model folder; choose another path")
    snapshot, found = _snapshot(name)
    with _reported(found.name, None, "downloaded"):
        _check_space(found.num_bytes, folder.absolute().parent)
        with new_folder(folder) as part:
            for file in _own_files(snapshot):
                (part / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(snapshot / file, part / file)
            _check_model(part, found.name)
    return found


def cached_model(name: str) -> Path:
    """Return the folder of a model of the hub in the local cache, which is filled if needed; errors of `pull_model`.

    With `HF_HUB_OFFLINE=1`, the hub is not asked.
    """
    return _snapshot(name)[0]


def _snapshot(name: str) -> tuple[Path, RemoteModel]:
    """Return the folder of a model in the cache, downloaded and checked, and what the hub says of it."""
    from huggingface_hub import HfApi, constants, snapshot_download

    repository, revision = parse_hub_name(name)
    api = HfApi()
    with _reported(repository, revision, "downloaded"), quiet_hub():
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
            num_bytes = sum((folder / file).stat().st_size for file in _own_files(folder))
        else:
            info = api.model_info(repository, revision=revision, files_metadata=True)
            sizes = _checked_files(repository, info.siblings or [])
            num_bytes = sum(sizes.values())
            _check_space(num_bytes, Path(constants.HF_HUB_CACHE))
            # By the name of the revision, which the cache remembers for later use without the hub.
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(sizes)))
            if folder.name != info.sha:
                raise InputError(f"{repository}: somebody pushed meanwhile; run the command again")
            for file, size in sizes.items():
                if (found := (folder / file).stat().st_size) != size:
                    raise InputError(
                        f"{repository}: {file} has {found:,} bytes, and {size:,} on the hub; pull it again"
                    )
    model_id = _check_model(folder, repository)
    return folder, RemoteModel(repository, folder.name, f"{api.endpoint}/{repository}", model_id, num_bytes)


def _checked_files(repository: str, siblings: "list[RepoSibling]") -> dict[str, int]:
    """Return the sizes of the files that are downloaded, by name; `InputError` if they are no model of orbithash."""
    sizes = {file.rfilename: file.size for file in siblings if _is_own(file.rfilename)}
    if absent := [file for file in _NEEDED if file not in sizes]:
        raise InputError(
            f"{repository} is not a model of orbithash: it has no {' and no '.join(absent)}; give one that "
            "`orbithash push` uploaded"
        )
    known = {file: size for file, size in sizes.items() if size is not None}
    if len(known) < len(sizes):
        raise InputError(f"{repository}: the hub does not state the sizes of all files; try again later")
    if known["model.json"] > MAX_JSON_BYTES or sum(known.values()) > MAX_BYTES:
        raise InputError(
            f"{repository} has {sum(known.values()):,} bytes, {known['model.json']:,} of them in model.json; at most "
            f"{MAX_BYTES:,} and {MAX_JSON_BYTES:,} are allowed"
        )
    return known


def _is_own(file: str) -> bool:
    return bool(_ROOT_FILE.fullmatch(file) or _TEXT_FILE.fullmatch(file))


def _own_files(folder: Path) -> list[str]:
    """Return the names of the files of a model folder that are exchanged, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(filter(_is_own, found))


def _check_model(folder: Path, repository: str) -> str:
    """Return the model_id; `InputError` if the model is damaged or incomplete."""
    try:
        _, model_id, _ = read_model_folder(folder)
        _check_text_encoder(folder)
    except InputError as err:
        raise InputError(f"{repository}: not a model that this orbithash can load: {one_line(err)}") from err
    return model_id


def _check_text_encoder(folder: Path) -> None:
    """Raise `InputError` if the text encoder of a model with a text side is missing or damaged."""
    stated = json.loads((folder / "model.json").read_bytes())["text_encoder"]
    if stated is None:
        return
    from orbithash.encoders.networks.text_towers import stored_sha256

    if stored_sha256(folder / "text_encoder") != stated["encoder_sha256"]:
        raise InputError(f"{folder / 'text_encoder'}: damaged (its files do not give the hash in model.json)")


def _described_model(card: Path) -> str | None:
    """Return the model_id that a model card states; None if it states none."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("orbithash")
    except (OSError, ValueError, yaml.YAMLError) as err:
        raise InputError(f"{card}: its front matter cannot be read ({one_line(err)}); write the card again") from err
    found = stated.get("model_id") if isinstance(stated, dict) else None
    return found if isinstance(found, str) else None


def _check_space(num_bytes: int, folder: Path) -> None:
    """Raise `InputError` if the disk of a folder, which may not exist yet, lacks space."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise InputError(f"{folder}: {num_bytes:,} bytes are needed, and {free:,} are free; make space on that disk")


@contextmanager
def _reported(repository: str, revision: str | None, verb: str) -> Iterator[None]:
    """Turn errors of the hub, the network and the disk into one line; `verb` is "uploaded" or "downloaded"."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as err:
        raise InputError(f"{repository} cannot be {verb}: {_reason(err, repository, revision)}") from err


def _reason(err: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repository}"
    if isinstance(err, GatedRepoError):
        return f"it is gated; accept its conditions at {page}, and give a token: run `hf auth login`, or set HF_TOKEN"
    if isinstance(err, RevisionNotFoundError):
        return f"it has no revision {revision!r}; give a branch, a tag or a commit that {page} lists"
    if isinstance(err, RepositoryNotFoundError):
        return "the hub has no such model, or it is private; check the name, and run `hf auth login` or set HF_TOKEN"
    if isinstance(err, HfHubHTTPError) and err.response is not None:
        status = err.response.status_code
        if status in (401, 403):
            return f"the hub denies access ({status}); use a token that may write there: run `hf auth login`"
        return f"the hub answers {status} ({one_line(err)}); try again later"
    if isinstance(err, LocalEntryNotFoundError):
        return "it is not in the local cache, and the hub cannot be reached; check the network and HF_HUB_OFFLINE"
    if isinstance(err, HFValidationError):
        return f"its name is not valid ({one_line(err)})"
    if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make space, and run the command again: complete files are kept"
    if isinstance(err, OSError) and err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{err.filename or 'a file'} cannot be written ({err.strerror})"
    return f"{one_line(err)}; check the network, and run the command again"
