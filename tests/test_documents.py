"""Rules of the pages: their length, their links, their examples. `make docs` and `make docs-test` need more time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(path for path in (ROOT / "docs").rglob("*.md") if "reference" not in path.parts),
    *(ROOT / "docs/reference").glob("*.md"),
]
MAX_LINES = 250
# The map of the code is one page, which tests compare with the folders.
LONG = {"docs/architecture.md": 560, "README.md": 320}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_is_longer_than_a_person_reads(page):
    limit = LONG.get(str(page.relative_to(ROOT)), MAX_LINES)
    assert len(page.read_text().splitlines()) <= limit


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_files_outside_of_the_documents_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_variable_of_the_code_is_in_the_reference():
    code = "".join(
        path.read_text()
        for floor in ("encoders", "trainers", "search", "cluster")
        for path in (ROOT / floor).rglob("*.py")
    )
    page = (ROOT / "docs/reference/environment.md").read_text()
    assert {name for name in re.findall(r"\bORBITHASH_[A-Z_]+", code) if f"`{name}`" not in page} == set()


def run_pages(*pages):
    """Run the examples of pages as `make docs-test` does; return the exit code and the output."""
    command = [sys.executable, "-m", "pytest", "-p", "examples", "-p", "no:cacheprovider", "--rootdir", ROOT, *pages]
    done = subprocess.run(
        command,
        env={"PYTHONPATH": str(ROOT / ".ci"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def write(tmp_path, text):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "page.md").write_text(text)
    return tmp_path / "page.md"


def test_examples_run_in_order_and_share_their_state(tmp_path):
    page = write(
        tmp_path,
        "```bash\nexport A=7\nmkdir sub && cd sub\n```\n<!-- output -->\n```text\n```\n"
        "```bash\necho $A > file; pwd\n```\n<!-- output -->\n```text\n/.../sub\n```\n"
        "```python\nx = open('sub/file').read()\n```\n```python\nprint('x is', x)\n```\n"
        "<!-- output -->\n```text\nx is 7\n```\n<!-- exit: 3 -->\n```bash\nexit 3\n```\n"
        "<!-- not run: no such machine -->\n```bash\nfalse\n```\n",
    )
    code, output = run_pages(page)
    assert code == 0, output
    assert "not run: " in output
    assert "no such machine" in output
    assert "8 examples ran, 1 did not" in output


WRONG = {
    "```bash\nfalse\n```\n```bash\ntrue\n```\n": "exit code 1, expected 0",
    "```python\n1 / 0\n```\n": "ZeroDivisionError",
    "```bash\necho one\n```\n<!-- output -->\n```text\ntwo\n```\n": "but the example printed:\none",
    "<!-- not run -->\n```bash\nfalse\n```\n": "write the reason",
    "```\norbithash status\n```\n": "a block without a language",
    "```shell\norbithash status\n```\n": "language shell; known are bash, python",
    "```{code-block} bash\nfalse\n```\n": "as a plain block of bash or python",
    "<!-- data: tyles -->\n```bash\ntrue\n```\n": "data tyles; known are tiles",
}


def test_examples_that_are_wrong_fail(tmp_path):
    pages = [write(tmp_path / str(number), text) for number, text in enumerate(WRONG)]
    code, output = run_pages("--continue-on-collection-errors", *pages)
    assert code == 1
    assert [problem for problem in WRONG.values() if problem not in output] == []
    # Of the first three pages, only the echo runs. Nothing runs after an error, nor in pages that break the rules.
    assert "1 examples ran, 1 did not" in output
