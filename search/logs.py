"""Log lines as text or JSON that name the requests they belong to."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum

__all__ = ["Format", "current_request", "is_json", "log_to_stderr", "set_requests"]


class Format(StrEnum):
    """Format of log lines: text for people, or one JSON object per line."""

    TEXT = "text"
    JSON = "json"


_requests: ContextVar[str] = ContextVar("orbithash_requests", default="")

# Attributes of every record; others come from the argument `extra`.
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "request_id"}


def current_request() -> str:
    """Return the id of the current request, or ""; in a batch, the ids of its requests separated by commas."""
    return _requests.get()


def set_requests(ids: Iterable[str]) -> None:
    """Set the requests named in log lines of this task and of the tasks that it starts from now on."""
    _requests.set(",".join(dict.fromkeys(filter(None, ids))))


@contextmanager
def log_to_stderr(format_: Format) -> Iterator[None]:
    """Log to stderr within the block: from level INFO for this package, from WARNING for libraries."""
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
    """Return whether the process logs to stderr as JSON."""
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
            **{name: value for name, value in vars(record).items() if name not in _STANDARD},
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
