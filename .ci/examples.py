"""Run the examples of the documents: a pytest plugin of `make docs-test`.

Each fenced block with the language bash or python is a test. The blocks of a page run in order, in a temporary folder
of the page. docs/extend/documents.md describes the comments that control them.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from example_data import DATA, lay_out, plugins
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.region import Lexeme

HERE = Path(__file__).resolve().parent
# Only against examples that hang: a busy machine takes long.
TIMEOUT_S = 1200

# Addresses in the pages. Free ports replace them, so that other servers of this machine do not matter.
ADDRESSES = ("127.0.0.1:50051", "127.0.0.1:8080")

RUN = ("bash", "python")
SHOWN = ("text", "json", "yaml", "toml", "sql", "html", "ini", "diff", "proto", "markdown")

_FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<info>[^\n]*)\n"))
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)


class PageError(ValueError):
    """A page that breaks the rules of docs/extend/documents.md."""


class Page:
    """The session of one page: its temporary folder, environment, Python interpreter and servers."""

    def __init__(self, path: Path, data: list[str]) -> None:
        self.path = path
        self.data = data
        self.output = ""
        self.has_failed = False
        self._folder: Path | None = None
        self._python: subprocess.Popen[str] | None = None

    def start(self, session: Path) -> None:
        """Lay out the folder of the page, unless that has been done."""
        if self._folder is not None:
            return
        # Short: Ray's sockets are below it if a page sets TMPDIR.
        self._hidden = session / f"{len(list(session.iterdir()))}"
        self._folder = self._hidden / "page"
        self._folder.mkdir(parents=True)
        (self._hidden / "servers").mkdir()
        self._ports = {address: f"127.0.0.1:{_free_port()}" for address in ADDRESSES}
        self._env = {
            **os.environ,
            "PATH": os.pathsep.join([str(HERE / "example_bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "ORBITHASH_ADDRESS": self._ports[ADDRESSES[0]],
            "EXAMPLES_ORBITHASH": str(Path(sys.executable).with_name("orbithash")),
            "EXAMPLES_SERVERS": str(self._hidden / "servers"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        }
        lay_out(self.data, self._folder, session.parent)
        self._state = self._hidden / "state.sh"
        self._state.touch()

    def run(self, code: str, language: str, line: int) -> tuple[int, str]:
        """Run one block and return its exit code and output. `line` is the number of its first line in the page."""
        for address, port in self._ports.items():
            code = code.replace(address, port)
        return self._run_bash(code) if language == "bash" else self._run_python(code, line)

    def _run_bash(self, code: str) -> tuple[int, str]:
        # The variables and the working folder of a block hold for the next one.
        script = f'source {self._state}\nset -euo pipefail\n{code}\n{{ export -p; echo cd "$PWD"; }} > {self._state}\n'
        log = self._hidden / "output.txt"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["bash", "-c", script],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code_ = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _end_group(process.pid)
                return 124, log.read_text() + f"\nended after {TIMEOUT_S} s"
        return code_, log.read_text()

    def _run_python(self, code: str, line: int) -> tuple[int, str]:
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, HERE / "example_python.py"],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        channel, answers = self._python.stdin, self._python.stdout
        assert channel is not None, "a pipe"
        assert answers is not None, "a pipe"
        try:
            print(json.dumps([code, str(self.path), line]), file=channel, flush=True)
        except BrokenPipeError:
            return 1, "the Python interpreter of the page has ended"
        lines = []
        for text in answers:
            if text.startswith(_END):
                return int(text.removeprefix(_END)), "".join(lines)
            lines.append(text)
        return self._python.wait(), "".join(lines)

    def close(self) -> None:
        """End the interpreter and the servers, and delete the folder."""
        if self._folder is None:
            return
        if self._python is not None:
            # A child that has ended is alive to `tail --pid` until it is waited for.
            with suppress(ProcessLookupError):
                os.killpg(self._python.pid, signal.SIGKILL)
            self._python.wait()
        for file in (self._hidden / "servers").glob("*.pid"):
            _end_group(int(file.read_text()))
        shutil.rmtree(self._folder, ignore_errors=True)


_END = "\x1eexit code "


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _end_group(pid: int) -> None:
    """End a process and its children."""
    for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            # A child of this process stays in its group until somebody waits for it.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                return
            number = 0
            time.sleep(0.05)


def parse(document: Document) -> Iterator[Region]:
    """Find the examples of a page. Raises `PageError` for a block or comment that breaks the rules."""
    fences = sorted(_FENCES(document), key=lambda region: (region.start, -region.end))
    blocks: list[Region] = []
    for region in fences:
        # A block inside a block is text, except inside a directive such as {note}.
        if not blocks or region.start >= blocks[-1].end or _info(blocks[-1]).startswith("{"):
            blocks.append(region)
    comments = [
        match
        for match in _COMMENT.finditer(document.text)
        if not any(b.start <= match.start() < b.end for b in blocks if not _info(b).startswith("{"))
    ]
    data = [word for match in comments if match[1].startswith("data:") for word in match[1][5:].split()]
    if unknown := set(data) - set(DATA):
        raise PageError(f"{document.path}: data {', '.join(sorted(unknown))}; known are {', '.join(DATA)}")
    page = Page(Path(document.path), data)
    document.namespace["page"] = page
    for match in comments:
        if match[1].startswith("run\n"):
            source = Lexeme(match[1].removeprefix("run\n"), 0, 0)
            yield Region(match.start(), match.end(), source, partial(_evaluate, page, "bash", {}))
    for region in blocks:
        info = _info(region)
        rules = dict(_rules(document.text, region.start, comments))
        where = f"{document.path}:{document.text.count(chr(10), 0, region.start) + 1}"
        if "not run" in rules and not rules["not run"]:
            raise PageError(f"{where}: write the reason: <!-- not run: REASON -->")
        if not info:
            raise PageError(f"{where}: a block without a language; examples are bash or python, anything else is text")
        if info.startswith(("{code", "{sourcecode")):
            raise PageError(f"{where}: write an example as a plain block of bash or python, so that it runs")
        if info in RUN:
            yield Region(region.start, region.end, region.lexemes["source"], partial(_evaluate, page, info, rules))
        elif "output" in rules:
            yield Region(region.start, region.end, region.lexemes["source"], partial(_compare, page))
        elif info not in SHOWN and not info.startswith("{"):
            raise PageError(f"{where}: language {info}; known are {', '.join((*RUN, *SHOWN))}")


def _info(region: Region) -> str:
    return str(region.lexemes["info"]).strip()


def _rules(text: str, start: int, comments: Iterable[re.Match[str]]) -> Iterator[tuple[str, str]]:
    """Return what the comments directly before position `start` say: names and texts."""
    for match in reversed(list(comments)):
        if match.end() <= start and not _COMMENT.sub("", text[match.end() : start]).strip():
            name, _, value = match[1].partition(":")
            yield name.strip(), value.strip()


def _evaluate(page: Page, language: str, rules: dict[str, str], example: Example) -> str | None:
    if reason := rules.get("not run"):
        pytest.skip(reason)
    if page.has_failed:
        pytest.skip("an earlier example of this page failed")
    page.start(example.namespace["session"])
    # The next block runs only if this one ends well.
    page.has_failed = True
    expected = int(rules.get("exit", "0"))
    code, page.output = page.run(str(example.parsed), language, example.line + 1)
    print(page.output)
    if code != expected:
        return f"exit code {code}, expected {expected}, of this example:\n{example.parsed}\n{page.output}"
    page.has_failed = False
    return None


def _compare(page: Page, example: Example) -> str | None:
    """Compare the output of the example before with the text of the page, in which ... stands for any text."""
    if page.has_failed:
        pytest.skip("an earlier example of this page failed")
    expected, got = (re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip() for text in (example.parsed, page.output))
    if re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*?"), got, re.DOTALL):
        return None
    return f"the page shows this output:\n{expected}\n\nbut the example printed:\n{got}"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let an example end by its own limit, before that of a test."""
    if config.option.timeout is None:
        config.option.timeout = TIMEOUT_S + 60


# A Ray cluster as each command would start it by itself, which takes seconds each time. Servers keep some of its CPUs.
_CLUSTER = """
import os, sys
from orbithash.cluster.runtime import connected
with connected(min_cpus=8):
    import ray
    print("cluster", ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of the folders of all pages; all commands join one Ray cluster."""
    # Workers of the cluster have the environment that it was started with.
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))
    pages = tmp_path_factory.mktemp("pages")
    packages = os.pathsep.join([str(plugins(pages.parent)), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        env={**os.environ, "PYTHONPATH": packages},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None, "a pipe"
        # Ray may print lines of its own.
        answer = next((line for line in process.stdout if line.startswith("cluster ")), "")
        assert answer, "Ray did not start"
        _, address, token = answer.split()
        os.environ |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        # 0, despite its name: the cluster listens on the loopback interface, and Ray looks for it there.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_LOG_TO_DRIVER": "0"}
        yield pages
        process.communicate()


def _teardown(namespace: dict[str, Any]) -> None:
    if page := namespace.get("page"):
        page.close()


_PAGES = Sybil([parse], patterns=["*.md"], path="/", fixtures=["session"], teardown=_teardown)
pytest_collect_file = _PAGES.pytest()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """State the number of examples that ran and that did not run, with the reasons of the latter."""
    reports = terminalreporter.stats
    skipped = reports.get("skipped", [])
    terminalreporter.section("examples")
    for report in skipped:
        reason = report.longrepr[-1]
        terminalreporter.line(f"not run: {report.nodeid}: {str(reason).removeprefix('Skipped: ')}")
    terminalreporter.line(f"{len(reports.get('passed', []))} examples ran, {len(skipped)} did not")
