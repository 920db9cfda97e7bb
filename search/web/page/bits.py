"""Codes of a state's query and of a row, bit by bit."""

from collections.abc import Sequence

from orbithash.search.client import AsyncClient
from orbithash.search.protocol.description import Description
from orbithash.search.web.page.examples import Examples
from orbithash.search.web.page.state import State

__all__ = ["differing_bits", "query_code", "vote"]


async def query_code(client: AsyncClient, state: State, examples: Examples, description: Description) -> bytes | None:
    """Return the packed code of a state's query; None if it has none, or if only the gateway can compute it.

    A sentence among other examples votes with the outputs of the network, which the page does not know.
    """
    query = examples.query
    if "code" in query:
        return bytes(query["code"])
    if "text" in query:
        return await client.encode(text=query["text"])
    if "key" in query:
        rows = await client.get([query["key"]], include=("code",))
        return next((row.code for row in rows.values()), None)
    positives = [example.code for example in query.get("positives", ())]
    negatives = [example.code for example in query.get("negatives", ())]
    if not positives or None in positives or None in negatives:
        return None
    return vote(positives, negatives, description.bits)


def vote(positives: Sequence[bytes], negatives: Sequence[bytes], bits: int) -> bytes:
    """Return the code that codes of equal weight make together; see `orbithash.v1.SearchRequest.examples`."""
    width = 8 * len(positives[0])
    code = 0
    for bit in range(bits):
        shift = width - 1 - bit
        good = sum(1 if _bit(example, shift) else -1 for example in positives)
        bad = sum(1 if _bit(example, shift) else -1 for example in negatives)
        balance = good * max(1, len(negatives)) - bad * len(positives)
        if balance > 0 or (balance == 0 and _bit(positives[0], shift)):
            code |= 1 << shift
    return code.to_bytes(len(positives[0]), "big")


def differing_bits(one: bytes, other: bytes) -> list[int]:
    """Return the numbers of the bits, from 0, in which two packed codes of one length differ."""
    width = 8 * len(one)
    both = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return [bit for bit in range(width) if both >> (width - 1 - bit) & 1]


def _bit(code: bytes, shift: int) -> int:
    return int.from_bytes(code, "big") >> shift & 1
