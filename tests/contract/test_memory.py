"""What only the store in memory does: it keeps a bounded number of keys."""

import pytest

from respcache.core.generations import FLOOR, Verdict
from respcache.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

GEN = "tenant:a:~gen"
HOUR_MS = 3_600_000


async def test_the_least_recently_used_key_goes_first_also_when_it_is_a_generation() -> None:
    """Eviction is as harmless as on a server: what the evicted generation certified is not valid
    any more."""
    store = MemoryStore(max_keys=3)
    certificate = (await store.open(GEN, nonce=b"n" * 16, ttl_ms=HOUR_MS)).certificate()
    assert certificate is not None
    for name in ("one", "two"):
        store.put(name, b"x", ttl_ms=HOUR_MS, generation="tenant:b:~gen", generation_ttl_ms=HOUR_MS)
    await store.read("one", [])  # now the generation is the oldest, then "two"
    for name in ("three", "four"):
        store.put(name, b"x", ttl_ms=HOUR_MS, generation="tenant:b:~gen", generation_ttl_ms=HOUR_MS)
    reading = await store.read("two", [(GEN, [FLOOR])])
    assert reading.entry is None
    assert reading.generations[0].judge(certificate, [FLOOR]) is Verdict.NO_GENERATION
    assert [(await store.read(name, [])).entry for name in ("one", "three", "four")] == [b"x"] * 3
    assert store.server.evicted == 2
