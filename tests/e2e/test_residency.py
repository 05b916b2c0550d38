"""More models than fit: six, where the worker's weights have room for three."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muxserve.client import AdminClient, AsyncClient, Client, Completion, ModelState, Unavailable
from muxserve.engine.checkpoint import open_checkpoint
from tests.e2e.conftest import Cluster, running
from tests.engine.model_factory import make_model

NAMES = [f"m{number}" for number in range(6)]
ROOM = 3
RESIDENCY = 1.0
"""Seconds; short, for the tests' sake."""
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one shape, each with weights of its own."""
    folder = tmp_path_factory.mktemp("six")
    return {name: make_model("qwen3", folder / name, seed=seed) for seed, name in enumerate(NAMES)}


@contextlib.contextmanager
def crowded(folder: Path, checkpoints: dict[str, Path], residency: float, *options: str) -> Iterator[Cluster]:
    """The first model is pinned."""
    size = open_checkpoint(checkpoints["m0"], "auto").weight_bytes("panels")
    pinned = {"m0": ",pinned=true"}
    models = [f"--model={name}={path}{pinned.get(name, '')}" for name, path in checkpoints.items()]
    budget = f"--weight-budget={ROOM * size + size // 2}"
    setting = f"--set=placement.residency={residency}"
    with running(folder, *models, "--arena=32MiB", budget, setting, *options) as up:
        yield up


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Iterator[Cluster]:
    factor = "--set=placement.residency_factor=0"
    with crowded(tmp_path_factory.mktemp("full"), checkpoints, RESIDENCY, factor) as up:
        yield up


def loads(cluster: Cluster) -> Counter[str]:
    return Counter({model["name"]: model["loads"] for model in cluster.status()["models"]})


def states(cluster: Cluster) -> Counter[str]:
    return Counter(model["state"] for model in cluster.status()["models"])


def of(status: dict[str, Any], name: str) -> dict[str, Any]:
    return next(model for model in status["models"] if model["name"] == name)


def ask(client: Client, model: str, **options: Any) -> Completion:
    arguments = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "timeout": 60.0, **options}
    return client.generate(model, prompt_tokens=PROMPT, **arguments)


def test_all_answer_and_the_pinned_one_is_never_unloaded(full: Cluster) -> None:
    assert states(full) == {"ready": ROOM, "asleep": len(NAMES) - ROOM}
    with Client(full.gateway) as client, AdminClient(full.admin) as admin:
        first = {name: ask(client, name).token_ids for name in NAMES}
        again = {name: ask(client, name).token_ids for name in reversed(NAMES)}
        assert first == again and len(set(first.values())) == len(NAMES)
        assert states(full)["ready"] <= ROOM
        (pinned,) = (m for u in admin.placement().units for m in u.models if m.config.name == "m0")
    assert (pinned.state, pinned.loads) == (ModelState.READY, 1)
    full.wait_idle()


async def test_requests_that_come_together_load_a_model_once(full: Cluster) -> None:
    # Asked of who decides: for a moment the gateway takes a model for asleep that has just been loaded.
    before = await asyncio.to_thread(full.status)
    asleep = next(model for model in before["models"] if model["state"] == "asleep")
    name = asleep["name"]
    async with AsyncClient(full.gateway) as client:
        answers = await asyncio.gather(
            *(
                client.generate(name, prompt_tokens=PROMPT, max_tokens=4, temperature=0, timeout=60)
                for _ in range(20)
            )
        )
    assert len({answer.token_ids for answer in answers}) == 1
    # Answers may come before it is written down that the model was loaded.
    await asyncio.to_thread(
        full.wait, "it is loaded", lambda status: of(status, name)["state"] == "ready", 10
    )
    assert (await asyncio.to_thread(loads, full))[name] == asleep["loads"] + 1


def test_loads_per_minute_are_bounded_under_alternating_load(full: Cluster) -> None:
    before, began = loads(full), time.monotonic()
    with Client(full.gateway) as client:
        while time.monotonic() - began < 6:
            for name in NAMES[1:]:
                ask(client, name)
    seconds = time.monotonic() - began
    count = (loads(full) - before).total()
    # Two places take turns, and each stays at least half of the residency.
    bound = 2 * (1 + seconds / (RESIDENCY / 2))
    assert 0 < count <= bound
    assert loads(full)["m0"] == 1


@pytest.mark.slow
async def test_models_that_are_all_busy_take_turns_and_their_texts_do_not_change(full: Cluster) -> None:
    """Each is put to sleep again and again while it generates, and goes on when it is woken."""
    async with AsyncClient(full.gateway) as client:

        async def generate(name: str, seed: int) -> tuple[int, ...]:
            answer = await client.generate(
                name, prompt_tokens=PROMPT, max_tokens=250, seed=seed, ignore_eos=True, timeout=120
            )
            return answer.token_ids

        work = [(name, seed) for name in NAMES for seed in range(4)]
        together = await asyncio.gather(*(generate(*each) for each in work * 2))
        alone = [await generate(*each) for each in work]
    assert together == alone * 2
    await asyncio.to_thread(full.wait_idle)


def test_what_a_model_had_cached_and_was_given_goes_when_it_sleeps(full: Cluster) -> None:
    """Prefixes are forgotten, blocks are free, and its quota holds again once it is awake."""
    prompt = list(range(3, 90))
    with Client(full.gateway) as client:
        for name in NAMES:
            client.generate(name, prompt_tokens=prompt, max_tokens=2, temperature=0, timeout=60)
    status = full.wait("prefixes", lambda s: any(m["blocks_cached"] for m in s["models"]), 10)
    asleep = [m for m in status["models"] if m["state"] == "asleep"]
    assert asleep and all(
        (m["blocks_cached"], m["blocks_held"], m["quota_blocks"]) == (0, 0, 0) for m in asleep
    )

    def agree(status: dict[str, Any]) -> bool:
        """Whether what models have cached is what the pool has: they are not seen at the same moment."""
        cached = sum(m["blocks_cached"] for m in status["models"] if m["state"] == "ready")
        return 0 < cached == status["pool"][0]["cached_blocks"]

    full.wait("prefixes are those of models that are awake", agree, 10)
    full.wait_idle()


def _wait_of(status: dict[str, Any], name: str) -> float:
    waits = {model["name"]: model["expected_wait"] for model in status["models"]}
    return math.inf if waits[name] is None else float(waits[name])


def test_who_cannot_wait_is_refused_at_once_with_the_wait(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    """What is loaded is in its residency: for 20 s there is no room for others."""
    with crowded(tmp_path, checkpoints, 20.0) as up, Client(up.gateway) as client:
        for name in NAMES[1:ROOM]:
            ask(client, name)
        sleeping = [model.name for model in client.models() if model.state is ModelState.ASLEEP]
        assert len(sleeping) == len(NAMES) - ROOM
        took = []
        for name in sleeping:
            began = time.monotonic()
            with pytest.raises(Unavailable, match=r"asleep.* the request has [23]\.\d\d s") as caught:
                ask(client, name, timeout=3.0)
            took.append(time.monotonic() - began)
            assert caught.value.retry_after is not None and 3.0 < caught.value.retry_after < 25.0
        assert min(took) < 0.1 and max(took) < 2  # a busy machine may stop; who waits does so for 3 s
        before = loads(up)
        assert all(before[name] == 0 for name in sleeping)  # who is refused wakes nobody
        # With a model pinned for each place there will never be room.
        with AdminClient(up.admin) as admin:
            for name in NAMES[1:ROOM]:
                admin.pin(name)
        up.wait("no room", lambda s: all(_wait_of(s, n) == math.inf for n in sleeping), 10)
        with pytest.raises(Unavailable, match="pinned"):
            _until_pinned_is_known(client, sleeping[0])


def _until_pinned_is_known(client: Client, name: str) -> None:
    """The gateway follows the placement within a moment."""
    while client.model(name).expected_wait != math.inf:
        time.sleep(0.05)
    ask(client, name, timeout=1e6)
