"""Fixtures that several test packages share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
from redis.asyncio import Redis

from muxserve.common.store import connect
from tests.support.valkey import ValkeyProcess

# GPU kernels run compiled where there is a GPU, and interpreted where there is none. Triton settles that when
# it is first imported, and torch, which many tests import, does so.
os.environ["TRITON_INTERPRET"] = "0" if Path("/dev/nvidiactl").exists() else "1"


# Properties are not about time, and a machine that has other work too may stop for a second.
hypothesis.settings.register_profile("muxserve", deadline=None)
hypothesis.settings.load_profile("muxserve")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave anything in the cache directory of who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyProcess]:
    """A running Valkey of this test's own; `kill()` and `start()` again as you like."""
    directory = tmp_path / "valkey"
    directory.mkdir()
    server = ValkeyProcess(directory)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def redis_client(valkey: ValkeyProcess) -> AsyncIterator[Redis]:
    """A client of that server, closed after the test."""
    client = connect(valkey.url)
    yield client
    await client.aclose()
