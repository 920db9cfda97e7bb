"""What a release states: its version, the versions of its formats; when none is made."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from orbithash.encoders.archive import storage
from orbithash.encoders.networks import card

ROOT = Path(__file__).resolve().parents[1]


def test_the_changelog_has_the_version_and_the_formats():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)} ", changelog, re.MULTILINE)
    assert f"| model folder | {card.FORMAT_VERSION} |" in changelog
    assert f"| archive | {storage.FORMAT_VERSION} |" in changelog


def test_a_release_does_not_replace_another_folder(tmp_path):
    (tmp_path / "thesis.pdf").write_text("years of work")
    (tmp_path / "SHA256SUM").touch()
    words = [sys.executable, ROOT / ".ci/release.py", "--out", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("no release: ")
    assert (tmp_path / "thesis.pdf").read_text() == "years of work"
