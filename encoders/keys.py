"""Keys of rows: the one rule for `encode`, `upsert`, `delete` and every other place that takes a key."""

import unicodedata

__all__ = ["MAX_KEY_CHARS", "key_problem"]

MAX_KEY_CHARS = 4096

# Control characters, halves of surrogate pairs, and the separators of lines and paragraphs. They cannot be written into
# a list with one key per line, or would act on the terminal that shows them. All other characters are allowed: file
# names do hold no-break spaces, joiners and characters that are newer than this Python.
_FORBIDDEN = ("Cc", "Cs", "Zl", "Zp")


def key_problem(key: str) -> str | None:
    """Return what is wrong with a key, in one line; None for a valid key."""
    if not 0 < len(key) <= MAX_KEY_CHARS:
        return f"a key has 1 to {MAX_KEY_CHARS:,} characters, got {len(key):,}"
    # Nearly all keys are printable, and this test is quick.
    if not key.isprintable() and any(unicodedata.category(character) in _FORBIDDEN for character in key):
        return f"a key has printable characters, no control characters or line separators; got {key[:80]!r}"
    return None
