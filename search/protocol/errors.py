"""What can go wrong with a search, the same in process and through the gateway.

Those that are the user's fault are `InputError` too. `reason` is what the gateway writes into google.rpc.ErrorInfo.
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


class SearchError(Exception):
    """A search has no answer. The message is one line that a user may see.

    Attributes:
        request_id: where it came over the wire, what the gateway's log calls the request.
    """

    reason: ClassVar[str]
    request_id: str | None = None


class InvalidQuery(SearchError, InputError):
    """The query is wrong; `violations` holds (field of SearchRequest, what was got and what is allowed)."""

    reason = "INVALID_QUERY"

    def __init__(self, *violations: tuple[str, str]) -> None:
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in violations))
        self.violations = violations


class KeyNotFound(SearchError, InputError):
    """No row of the archive has the key."""

    reason = "KEY_NOT_FOUND"


class DeadlineExceeded(SearchError):
    """The time given for the search has passed."""

    reason = "DEADLINE_EXCEEDED"


class Unavailable(SearchError):
    """No shard could answer, or too few; or the archive cannot be written now."""

    reason = "UNAVAILABLE"


class Overloaded(SearchError):
    """Too much is asked at once; `retry_after_s` is when to try again."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(SearchError, InputError):
    """The gateway asks for a token, and got none that it knows."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(SearchError, InputError):
    """The token's role does not allow this call."""

    reason = "PERMISSION_DENIED"


class GatewayError(SearchError):
    """The gateway failed inside. Its message names the request in the gateway's log."""

    reason = "INTERNAL"


class GatewayUnreachable(InputError):
    """Nothing answers at the gateway's address."""
