import hmac
import logging

import pytest

from orbithash.encoders.errors import InputError
from orbithash.search.gateway import tokens as tokens_module
from orbithash.search.gateway.tokens import Holder, Tokens, read_token

READER, WRITER = "r" * 20, "w" * 20
GOOD = f"# readers\nread {READER} alice\n\n  write\t{WRITER}  bob\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokens"

    def write(text, mode=0o600):
        """Replace the file, as editors do."""
        part = tmp_path / "part"
        part.write_bytes(text if isinstance(text, bytes) else text.encode())
        part.chmod(mode)
        part.rename(path)
        return path

    return write


def test_holders_and_their_roles(file):
    tokens = Tokens(file(GOOD))
    alice, bob = tokens.holder(READER), tokens.holder(WRITER)
    assert (alice, bob) == (Holder("alice", "read"), Holder("bob", "write"))
    assert (alice.may("read"), alice.may("write")) == (True, False)
    assert (bob.may("read"), bob.may("write")) == (True, True)
    for wrong in ("", READER[:-1], READER + "r", READER.upper(), "alice", "#", "\ud800", "é" * 20):
        assert tokens.holder(wrong) is None


def test_every_digest_is_compared_for_every_token(file, monkeypatch):
    tokens = Tokens(file(GOOD))
    compared = []

    def compare(a, b):
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(tokens_module, "hmac", Watched)
    for token in (READER, WRITER, "x", "y" * 10_000):
        compared.clear()
        tokens.holder(token)
        assert compared == [(32, 32), (32, 32)]


def test_all_problems_at_once_and_no_token_among_them(file):
    text = (
        f"admin {READER} eve\nread short eve\nread {READER} alice\nwrite {READER} bob\n{WRITER} read bob\n"
        "write only-two-of-them\n"
    )
    with pytest.raises(InputError) as caught:
        Tokens(file(text))
    lines = str(caught.value).splitlines()
    assert "found" in lines[0]
    for number, words in (
        (1, "not a role"),
        (2, "at least 16 characters, got 5"),
        (3, "an earlier line has the same token"),
        (4, "an earlier line has the same token"),
        (5, "not a role"),
        (6, "2 words; ROLE TOKEN NAME"),
    ):
        assert any(f"line {number}:" in line and words in line for line in lines), (number, words)
    for secret in (READER, WRITER, "short", "only-two"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_file_that_others_may_read(file, mode):
    with pytest.raises(InputError, match="chmod 600") as caught:
        Tokens(file(GOOD, mode))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# nobody\n", "no caller would be"),
        (b"read \xff\xff\xff", "UTF-8"),
        ("a" * (2**20 + 1), "more than 1,048,576"),
    ],
)
def test_invalid_token_files(file, text, words):
    with pytest.raises(InputError, match=words) as caught:
        Tokens(file(text))
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Tokens(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        Tokens(tmp_path)


def test_a_changed_file_counts_at_once(file):
    tokens = Tokens(file(GOOD))
    file(f"write {READER} alice\n")
    assert tokens.holder(READER) == Holder("alice", "write")
    assert tokens.holder(WRITER) is None
    # A file that is changed in place is read again, too.
    path = file(f"read {READER} alice\n")
    assert tokens.holder(READER).role == "read"
    path.write_text(GOOD)
    assert tokens.holder(WRITER) == Holder("bob", "write")


@pytest.mark.parametrize("damage", ["nonsense\n", "", "mode", "gone"])
def test_an_invalid_file_is_reported_and_the_earlier_tokens_stay_valid(file, caplog, damage):
    path = file(GOOD)
    tokens = Tokens(path)
    if damage == "mode":
        path.chmod(0o644)
    elif damage == "gone":
        path.unlink()
    else:
        file(damage)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert tokens.holder(READER) == Holder("alice", "read")
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once, not at each call"
    assert READER not in caplog.text
    file(f"read {WRITER} carol\n")
    assert tokens.holder(WRITER) == Holder("carol", "read")
    assert tokens.holder(READER) is None


def test_the_file_is_read_only_when_it_has_changed(file, monkeypatch):
    tokens = Tokens(file(GOOD))
    monkeypatch.setattr(tokens_module, "_read", lambda path: pytest.fail("it was read"))
    for _ in range(100):
        tokens.holder(READER)


def test_a_clients_token(file):
    assert read_token(file(f"{READER}\n")) == READER
    for text in ("", GOOD):
        with pytest.raises(InputError, match="one token and nothing else") as caught:
            read_token(file(text))
        assert READER not in str(caught.value)
    with pytest.raises(InputError, match="chmod 600"):
        read_token(file(READER, 0o644))


def test_a_token_never_shows(file):
    tokens = Tokens(file(GOOD))
    assert READER not in repr(vars(tokens))
