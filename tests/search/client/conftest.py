"""Both clients with the same methods."""

import asyncio
import inspect

import pytest

from orbithash.search.client import AsyncClient, Client


class Blocking:
    """An asyncio client that is called like the blocking one."""

    def __init__(self, address, *arguments, **options):
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._made(address, *arguments, **options))

    async def _made(self, *arguments, **options):
        return AsyncClient(*arguments, **options)

    def __getattr__(self, name):
        method = getattr(self._client, name)

        def call(*arguments, **options):
            result = method(*arguments, **options)
            return self._runner.run(collected(result) if inspect.isasyncgen(result) else result)

        return call

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._runner.run(self._client.close())
        self._runner.close()


async def collected(items):
    return [item async for item in items]


@pytest.fixture(params=[Client, Blocking], ids=["blocking", "asyncio"])
def make_client(request):
    return request.param
