"""Errors of searches and changes, the same in process and through the gateway.

Errors that the user can mend are `InputError` too. `reason` is the gateway's google.rpc.ErrorInfo.reason.
"""

from typing import ClassVar

from orbithash.encoders.errors import InputError

__all__ = [
    "DeadlineExceeded",
    "GatewayError",
    "GatewayUnreachable",
    "InvalidQuery",
    "KeyNotFound",
    "Overloaded",
    "PermissionDenied",
    "SearchError",
    "Unauthenticated",
    "Unavailable",
]

# Problems that the message of an error lists.
_MAX_LISTED = 5


class SearchError(Exception):
    """A search or a change failed. The message is one line that a user may see.

    Attributes:
        request_id: the id of the request in the gateway's log; None if the error was raised in this process.
    """

    reason: ClassVar[str]
    request_id: str | None = None


class InvalidQuery(SearchError, InputError):
    """The request is invalid.

    Attributes:
        violations: (field of the request, what was got and what is allowed) of each problem.
    """

    reason = "INVALID_QUERY"

    def __init__(self, *violations: tuple[str, str]) -> None:
        self.violations = tuple(dict.fromkeys(violations))
        listed = "; ".join(f"{field}: {problem}" for field, problem in self.violations[:_MAX_LISTED])
        more = len(self.violations) - _MAX_LISTED
        super().__init__(f"{listed}; and {more:,} more problems" if more > 0 else listed)


class KeyNotFound(SearchError, InputError):
    """No row of the archive has the key."""

    reason = "KEY_NOT_FOUND"


class DeadlineExceeded(SearchError):
    """The time limit of the call has passed."""

    reason = "DEADLINE_EXCEEDED"


class Unavailable(SearchError):
    """Too few shards answered, or the archive cannot be written at the moment."""

    reason = "UNAVAILABLE"


class Overloaded(SearchError):
    """The server has too much work waiting; try again after `retry_after_s` seconds."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(SearchError, InputError):
    """The gateway requires a token, and got none or an unknown one."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(SearchError, InputError):
    """The token's role does not allow this call."""

    reason = "PERMISSION_DENIED"


class GatewayError(SearchError):
    """The gateway failed. The message has the id of the request in the gateway's log."""

    reason = "INTERNAL"


class GatewayUnreachable(InputError):
    """No gateway answers at the address."""
