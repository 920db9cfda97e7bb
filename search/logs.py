"""Log lines that name the requests they are about, as text or as JSON."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum

__all__ = ["Format", "current_request", "is_json", "log_to_stderr", "set_requests"]


class Format(StrEnum):
    """Of lines: for a person, or one JSON object each."""

    TEXT = "text"
    JSON = "json"


_requests: ContextVar[str] = ContextVar("orbithash_requests", default="")

# What every record has; the rest was given by `extra`.
_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "request_id"}


def current_request() -> str:
    """The id of the request that is worked for, or "". Several share a batch: their ids, with commas."""
    return _requests.get()


def set_requests(ids: Iterable[str]) -> None:
    """Log lines of this task, and of what it starts from now on, are about these requests."""
    _requests.set(",".join(dict.fromkeys(filter(None, ids))))


@contextmanager
def log_to_stderr(format_: Format) -> Iterator[None]:
    """In the block, what this process logs goes to stderr: our lines from INFO on, those of libraries from WARNING."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if format_ is Format.JSON else _Text())
    root, ours = logging.getLogger(), logging.getLogger("orbithash")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)


def is_json() -> bool:
    """Whether a program is to read what this process writes to stderr."""
    return any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        request = f" [{current_request()}]" if current_request() else ""
        return f"{_time(record)} {record.levelname} {record.name}{request} {record.message}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **({"request_id": current_request()} if current_request() else {}),
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
