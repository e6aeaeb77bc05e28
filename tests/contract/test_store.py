"""The contract of ``stores/base.py`` on every store."""

from collections.abc import AsyncIterator

import pytest
from tests.contract.subjects import MemorySubject, ValkeySubject, restricted

from respcache.testing.store_contract import StoreContract, StoreSubject


class TestStores(StoreContract):
    """Also as the user of ``respcache acl``, whose rights must suffice."""

    @pytest.fixture(params=["memory", "valkey", "valkey, as the user of `respcache acl`"])
    async def subject(self, request: pytest.FixtureRequest) -> AsyncIterator[StoreSubject]:
        """An empty, connected store of each kind."""
        made: MemorySubject | ValkeySubject
        if request.param == "memory":
            made = MemorySubject()
        else:
            url = request.getfixturevalue("valkey_url")
            user_url = None if request.param == "valkey" else restricted(url)
            made = ValkeySubject(url, store_url=user_url)
        await made.store.connect()
        yield made
        await made.store.close()

    @pytest.fixture(params=["memory", "valkey"])
    async def restartable(self, request: pytest.FixtureRequest) -> AsyncIterator[StoreSubject]:
        """An empty, connected store of each kind, with a server of its own."""
        made: MemorySubject | ValkeySubject
        if request.param == "memory":
            made = MemorySubject()
        else:
            server = request.getfixturevalue("make_valkey")()
            made = ValkeySubject(server.url, server)
        await made.store.connect()
        yield made
        await made.store.close()
