"""`WeightStore`: weights made once and found again, by the next worker too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from structlog.testing import capture_logs

from muxserve.engine.messages import WeightLayout
from muxserve.worker.settings import WorkerSettings
from muxserve.worker.weight_memory import SharedMemories, WeightCacheOptions
from muxserve.worker.weights import WeightStore
from tests.engine.gguf_factory import write_gguf
from tests.engine.model_factory import make_model

pytestmark = pytest.mark.asyncio(loop_scope="session")

LIMIT = 2**30


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(
        make_model("llama", tmp_path / "hf"), tmp_path / "a.gguf", kind=GGMLQuantizationType.Q8_0
    )


async def load(
    path: Path, options: WeightCacheOptions | None, layout: WeightLayout = "panels"
) -> tuple[bytes, bool, list[str]]:
    """What another worker has in memory, whether it came from the cache, and what it warns of."""
    store = WeightStore(LIMIT, threads=1, timeout=60.0, memories=SharedMemories(options, layout))
    with capture_logs() as logs:
        found = await store.inspect(str(path), "auto")
        (fd,) = (await store.acquire("model", str(path), found)).descriptors
        content = os.pread(fd, found.bytes + 1, 0)
        await store.release(found)
    assert store.used == 0
    [loaded] = [entry for entry in logs if entry["event"] == "weights loaded"]
    return (
        content,
        loaded["from_cache"],
        [entry["reason"] for entry in logs if entry["log_level"] == "warning"],
    )


@pytest.mark.parametrize("layout", ["canonical", "panels"])
async def test_the_next_worker_finds_what_this_one_made(
    gguf: Path, tmp_path: Path, layout: WeightLayout
) -> None:
    options = WeightCacheOptions(tmp_path / "cache", LIMIT)
    first, *first_time = await load(gguf, options, layout)
    second, *second_time = await load(gguf, options, layout)
    assert (first_time, second_time) == ([False, []], [True, []])
    assert first == second == (await load(gguf, None, layout))[0]


async def test_a_model_loads_without_a_cache_too(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    options = WeightCacheOptions(tmp_path / "file" / "cache", LIMIT)
    for _ in range(2):
        _, from_cache, [warning] = await load(gguf, options)
        assert not from_cache
        assert str(options.directory) in warning


async def test_where_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = WorkerSettings(id="w").kept_weights
    assert kept is not None and kept.directory == tmp_path / "muxserve" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept = WorkerSettings(id="w").kept_weights
    assert kept is not None and kept.directory == tmp_path / "home" / ".cache" / "muxserve" / "weights"
    kept = WorkerSettings(id="w", weight_cache=tmp_path, weight_cache_limit="5GB").kept_weights
    assert kept == WeightCacheOptions(tmp_path, 5 * 10**9)
    assert WorkerSettings(id="w", weight_cache_limit=0).kept_weights is None
    assert WorkerSettings(id="w", weight_cache=None).kept_weights is None


class Loads:
    """Loads one checkpoint after the other into one store, and tells what came from where."""

    def __init__(self, host_budget: int) -> None:
        self.store = WeightStore(
            LIMIT, threads=1, timeout=60.0, memories=SharedMemories(host_budget=host_budget)
        )

    async def __call__(self, path: Path) -> tuple[bytes, bool]:
        """What is in memory, and whether it was kept there."""
        with capture_logs() as logs:
            found = await self.store.inspect(str(path), "auto")
            (fd,) = (await self.store.acquire("model", str(path), found)).descriptors
            content = os.pread(fd, found.bytes + 1, 0)
            await self.store.release(found)
        assert self.store.used == 0
        return content, any(entry["event"] == "weights kept in memory" for entry in logs)


async def test_released_weights_come_back_from_host_memory(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "a")
    load = Loads(LIMIT)
    first, kept = await load(path)
    assert not kept
    assert await load(path) == (first, True)
    assert await Loads(0)(path) == (first, False)
    # A checkpoint that has changed is another one.
    make_model("llama", tmp_path / "a", seed=5)
    changed, kept = await load(path)
    assert not kept and changed != first


async def test_what_was_not_used_for_longest_makes_room_in_host_memory(tmp_path: Path) -> None:
    paths = [make_model("llama", tmp_path / f"{seed}", seed=seed) for seed in range(3)]
    size = (await Loads(0).store.inspect(str(paths[0]), "auto")).bytes
    load = Loads(2 * size)
    await load(paths[0])
    await load(paths[1])
    assert (await load(paths[0]))[1]
    assert not (await load(paths[2]))[1]
    assert (await load(paths[0]))[1]
    assert not (await load(paths[1]))[1]
