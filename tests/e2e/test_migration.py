"""Models move between two real workers while they stream: whoever dies, nothing is lost or comes twice.

Texts are greedy, with no near tie: what is recomputed differs in the last bits.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from muxserve.client import AsyncAdminClient, AsyncClient, FailedPrecondition, Move, Status, Unavailable
from muxserve.common.documents import PlacementStore
from muxserve.common.store import connect
from muxserve.v1 import admin_pb2
from tests.e2e.conftest import Cluster, running
from tests.engine.model_factory import make_model

STREAMS, TOKENS = 4, 1800
NEAR_TIE = 5e-5
"""Between log-probabilities: more than what float32 makes of another order of additions."""
PHASES = ["LOADING", "HANDING_OVER", "DRAINING", "UNLOADING"]
QUICK = {("source", "HANDING_OVER"), ("target", "HANDING_OVER"), ("placement", "UNLOADING")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers and two models, one on each."""
    folder = tmp_path_factory.mktemp("pair")
    path = make_model(
        "qwen3", folder / "tiny", head_dim=80, heads=8, kv_heads=2, layers=6, context=2048, seed=3
    )
    models = [part for name in "ab" for part in ("--model", f"{name}={path},dtype=float32")]
    more = ("--arena", "512MiB", "--workers", "2", "--set", "placement.rebalance=off")
    with running(folder, *models, *more) as up:
        yield up


async def where(admin: AsyncAdminClient, model: str) -> list[str]:
    """The workers that a model is on."""
    units = (await admin.placement()).units
    return [unit.worker_id for unit in units for each in unit.models if each.config.name == model]


async def settle(cluster: Cluster) -> None:
    """Wait until both models are ready, each in one place, and no worker holds blocks."""
    async with AsyncAdminClient(cluster.admin) as admin, asyncio.timeout(60):
        while not _settled(await _status(admin)):  # noqa: ASYNC110 (it is in other processes)
            await asyncio.sleep(0.1)


async def _status(admin: AsyncAdminClient) -> Status | None:
    try:
        return await admin.status()
    except Unavailable:  # it was killed
        return None


def _settled(status: Status | None) -> bool:
    if status is None or status.placement.migration is not None or len(status.workers) != 2:
        return False
    placed = [each for unit in status.placement.units for each in unit.models]
    ready = sorted((each.config.name, str(each.state)) for each in placed) == [("a", "ready"), ("b", "ready")]
    pools = [worker.pool for worker in status.workers]
    assert not any(pool.integrity_error for pool in pools)
    return ready and all(pool.free_blocks + pool.cached_blocks == pool.total_blocks for pool in pools)


async def stream(client: AsyncClient, number: int, begun: asyncio.Event | None = None) -> tuple[int, ...]:
    """The tokens of an answer; `begun` is set once it is under way."""
    tokens: list[int] = []
    answer = client.stream(
        "a", f"prompt {number}", max_tokens=TOKENS, temperature=0, ignore_eos=True, timeout=600
    )
    async with answer:
        async for chunk in answer:
            tokens += chunk.token_ids
            if begun is not None and len(tokens) >= 8:
                begun.set()
    return tuple(tokens)


@pytest.fixture(scope="module")
def undisturbed(pair: Cluster) -> list[tuple[int, ...]]:
    async def run() -> list[tuple[int, ...]]:
        async with AsyncClient(pair.gateway) as client:
            texts = await asyncio.gather(
                *(
                    client.generate(
                        "a", f"prompt {n}", max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2
                    )
                    for n in range(STREAMS)
                )
            )
        for text in texts:
            gaps = [each.top[0].logprob - each.top[1].logprob for each in text.logprobs or ()]
            assert min(gaps) > NEAR_TIE and len(set(text.token_ids)) > TOKENS / 10
        return [tuple(text.token_ids) for text in texts]

    return asyncio.run(run())


async def during(
    cluster: Cluster, drain_seconds: float, kill: tuple[str, str] | None = None
) -> tuple[list[tuple[int, ...]], bool]:
    """Streams, and a migration while they run; and whether somebody was killed. `kill`: a victim, and the
    phase in which it dies."""
    killing: asyncio.Task[bool] | None = None
    async with (
        AsyncClient(cluster.gateway) as client,
        AsyncAdminClient(cluster.admin) as admin,
        asyncio.TaskGroup() as tasks,
    ):
        (source,) = await where(admin, "a")
        target = "worker-1" if source == "worker-0" else "worker-0"
        begun = [asyncio.Event() for _ in range(STREAMS)]
        streams = [tasks.create_task(stream(client, n, begun[n])) for n in range(STREAMS)]
        await asyncio.gather(*(event.wait() for event in begun))
        if kill is not None:
            victim = {"source": source, "target": target, "placement": "placement-0"}[kill[0]]
            pid = next(each.pid for each in (await admin.status()).services if each.id == victim)
            killing = tasks.create_task(_kill(cluster, pid, kill[1]))
        try:
            async for _ in admin.rebalance([Move("a", target)], drain_seconds=drain_seconds):
                pass
        except Unavailable:
            assert kill is not None and kill[0] == "placement"
        texts = list(await asyncio.gather(*streams))
    return texts, killing is not None and killing.result()


async def _kill(cluster: Cluster, pid: int, phase: str, how: int = signal.SIGKILL) -> bool:
    """Kill a process as soon as the migration is in that phase; False: it has ended, and was not seen in it,
    which may have taken less time than passes between two looks."""
    wanted = admin_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}")
    async with connect(f"redis://{cluster.ready['redis']}") as redis, asyncio.timeout(60):
        store, ended = PlacementStore(redis), 0
        while (seen := await store.read()).migration.phase != wanted:
            ended = ended or len(seen.ended) + 1
            if len(seen.ended) >= ended:
                return False
    os.kill(pid, how)
    return True


@pytest.mark.timeout(240)
async def test_a_stream_goes_on_where_its_model_has_gone(
    pair: Cluster, undisturbed: list[tuple[int, ...]]
) -> None:
    async with AsyncAdminClient(pair.admin) as admin:
        before = await where(admin, "a")
        assert await during(pair, 0.0) == (undisturbed, False)
        assert await where(admin, "a") != before
    await settle(pair)


@pytest.mark.parametrize(
    ("victim", "phase"),
    [
        pytest.param(victim, phase, marks=() if (victim, phase) in QUICK else pytest.mark.slow)
        for victim, phase in itertools.product(["source", "target", "placement"], PHASES)
    ],
)
@pytest.mark.timeout(240)
async def test_streams_survive_a_kill_in_any_phase(
    pair: Cluster, undisturbed: list[tuple[int, ...]], victim: str, phase: str
) -> None:
    for _ in range(3):
        texts, killed = await during(pair, 0.2, (victim, phase))
        assert texts == undisturbed
        await settle(pair)
        if killed:
            return
    pytest.fail(f"the migration was never seen {phase}")


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_placement_process_that_stood_still_changes_nothing(
    pair: Cluster, undisturbed: list[tuple[int, ...]]
) -> None:
    async with (
        AsyncClient(pair.gateway) as client,
        AsyncAdminClient(pair.admin) as admin,
        connect(f"redis://{pair.ready['redis']}") as redis,
    ):
        (source,) = await where(admin, "a")
        (target,) = {"worker-0", "worker-1"} - {source}
        stopped = next(each.pid for each in (await admin.status()).services if each.kind == "placement")
        begun = [asyncio.Event() for _ in range(STREAMS)]
        streams = [asyncio.create_task(stream(client, n, begun[n])) for n in range(STREAMS)]
        await asyncio.gather(*(event.wait() for event in begun))
        moving = asyncio.create_task(_moved(admin, Move("a", target)))
        assert await _kill(pair, stopped, "LOADING", signal.SIGSTOP)
        store = PlacementStore(redis)
        second = _second_placement(stopped)
        try:
            async with asyncio.timeout(60):
                while (there := await store.read()).HasField("migration"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            os.kill(stopped, signal.SIGCONT)
            assert await moving == "done"  # it has found out what became of it
            assert list(await asyncio.gather(*streams)) == undisturbed
            now = await store.read()
            assert [list(unit.models) for unit in now.units] == [list(unit.models) for unit in there.units]
            assert await where(admin, "a") == [target]
        finally:
            os.kill(stopped, signal.SIGCONT)
            second.terminate()
            second.wait(10)
    await settle(pair)


async def _moved(admin: AsyncAdminClient, move: Move) -> str:
    """How the migration ended."""
    return str([event.migration.phase async for event in admin.rebalance([move], drain_seconds=0.2)][-1])


def _second_placement(pid: int) -> subprocess.Popen[bytes]:
    """A placement process like that one, beside it."""
    command = psutil.Process(pid).cmdline()
    settings = command[command.index("muxserve.placement") + 1 :]
    own = ["--set", 'id="placement-1"', "--set", 'bind="127.0.0.1:0"']
    return subprocess.Popen([sys.executable, "-m", "muxserve.placement", *settings, *own])


@pytest.mark.timeout(240)
async def test_a_worker_is_drained_under_load(pair: Cluster, undisturbed: list[tuple[int, ...]]) -> None:
    async with AsyncClient(pair.gateway) as client, AsyncAdminClient(pair.admin) as admin:
        (source,) = await where(admin, "a")
        begun = [asyncio.Event() for _ in range(STREAMS)]
        running = [asyncio.create_task(stream(client, n, begun[n])) for n in range(STREAMS)]
        await asyncio.gather(*(event.wait() for event in begun))
        events = [event async for event in admin.drain(source, drain_seconds=0.2)]
        assert (events[-1].held_blocks, events[-1].models_left) == (0, 0)
        later = await stream(client, 0)
        assert [*await asyncio.gather(*running), later] == [*undisturbed, undisturbed[0]]
        (other,) = await where(admin, "a")
        assert other != source and await where(admin, "b") == [other]
        with pytest.raises(FailedPrecondition, match="nowhere to go"):
            _ = [event async for event in admin.drain(other)]
        await admin.undrain(source)
        _ = [event async for event in admin.rebalance([Move("b", source)])]
    await settle(pair)
