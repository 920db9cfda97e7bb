"""Errors with more to say than a status can carry, over a real channel with the default limits of gRPC."""

import pytest
from search_parts import local_engine, serving, small_case

from orbithash.search.client import Client
from orbithash.search.protocol.errors import InvalidQuery, Unavailable


@pytest.mark.parametrize("text", ["x", "\U0001f6f0" * 400, "é%" * 5000, "\n" * 400])
def test_ten_thousand_violations_arrive_as_the_first_of_them(text):
    async def refuse(images):
        raise InvalidQuery(*((f"{'field' * 50}{number}", f"{number} {text}") for number in range(10_000)))

    with serving(local_engine(small_case(), refuse)) as gateway, Client(gateway.address) as client:
        with pytest.raises(InvalidQuery) as caught:
            client.search(image=b"an image")
        # The connection is still usable.
        assert len(client.search(key="place/7.tif", k=3).hits) == 3
    violations = caught.value.violations
    assert 1 <= len(violations) < 10_000
    assert [problem.split()[0] for _, problem in violations] == [str(number) for number in range(len(violations))]


def test_a_long_message_arrives_shortened():
    async def fail(images):
        raise Unavailable("\U0001f6f0" * 100_000 + "\nsecret")

    with (
        serving(local_engine(small_case(), fail)) as gateway,
        Client(gateway.address) as client,
        pytest.raises(Unavailable) as caught,
    ):
        client.search(image=b"an image")
    assert 100 < len(str(caught.value)) < 1000
    assert "secret" not in str(caught.value)
