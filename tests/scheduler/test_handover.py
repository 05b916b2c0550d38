"""A model that leaves a unit: its requests go on elsewhere, with exactly the text of an undisturbed run."""

from __future__ import annotations

import asyncio
import time
from typing import TypeAlias

import pytest

from muxserve.common.documents import PlacementStore
from muxserve.common.queue import RequestQueue
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2
from tests.scheduler.conftest import Setting, eventually
from tests.scheduler.fake_gateway import Client, FakeGateway
from tests.scheduler.fake_worker import FakeWorker, completion, shape

READY = inference_pb2.MODEL_STATE_READY
ASLEEP = inference_pb2.MODEL_STATE_ASLEEP
DRAINING = inference_pb2.MODEL_STATE_DRAINING
State: TypeAlias = inference_pb2.ModelState.ValueType

PROMPTS = [[n, n + 1, n + 2] for n in range(12)]


class Pair:
    """Two workers that both have model "a" loaded, and the placement that says which of them serve it."""

    def __init__(self, setting: Setting, workers: list[FakeWorker]) -> None:
        self.setting, self.workers = setting, workers

    async def place(self, *states: State | None, drain: float = 0.0) -> None:
        """The state of "a" on each worker; None: it is not placed there. `drain` in seconds from now."""
        units = []
        for number, (worker, state) in enumerate(zip(self.workers, states, strict=True)):
            unit = admin_pb2.Unit(
                unit=f"unit-{number}", worker_id=f"worker-{number}", worker_address=worker.address
            )
            if state is not None:
                until = round(1000 * (time.time() + drain)) if state == DRAINING else 0
                config = common_pb2.ModelConfig(name="a", path="x")
                unit.models.add(config=config, state=state, drain_until_unix_ms=until)
            units.append(unit)
        self.setting.epoch += 1
        placement = admin_pb2.Placement(epoch=self.setting.epoch, units=units)
        assert await PlacementStore(self.setting.redis).compare_and_set(self.setting.epoch - 1, placement)

    async def settled(self) -> None:
        """Nothing is held and nothing is left in the queue."""

        async def idle() -> bool:
            free = all(worker.available == worker.blocks for worker in self.workers)
            return free and await self.setting.queue_length("a") == 0

        await eventually(idle, 8)


async def two_workers(setting: Setting, slots: int = 4) -> Pair:
    workers = [await setting.worker(400, {"a": shape(slots=slots)}, seconds=0.005) for _ in range(2)]
    return Pair(setting, workers)


async def start(setting: Setting) -> tuple[Pair, FakeGateway]:
    pair = await two_workers(setting)
    await pair.place(READY, None)
    return pair, await setting.gateway((await setting.scheduler()).address)


async def ask_all(gateway: FakeGateway, tokens: int = 60) -> list[Client]:
    return [await gateway.ask("a", prompt, tokens) for prompt in PROMPTS]


async def check_all(clients: list[Client], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        for client in clients:
            await client.done.wait()
    for client in clients:
        assert client.failed is None
        assert client.tokens == completion(client.request.prompt_tokens, client.request.max_tokens)


@pytest.mark.parametrize("drain", [0.0, 0.4])
async def test_what_waits_and_what_runs_goes_on_at_the_other_unit(setting: Setting, drain: float) -> None:
    pair, gateway = await start(setting)
    clients = await ask_all(gateway, tokens=200)
    await clients[0].reach(20)
    pair.workers[0].gate.clear()  # or it could be done before
    await pair.place(DRAINING, READY, drain=drain)
    await eventually(lambda: clients[0].attempt == 2)
    assert not clients[0].done.is_set()
    pair.workers[0].gate.set()
    await eventually(lambda: pair.workers[0].available == pair.workers[0].blocks)
    await pair.place(None, READY)
    await check_all(clients)
    await pair.settled()


async def test_what_runs_may_finish_in_its_time(setting: Setting) -> None:
    pair, gateway = await start(setting)
    clients = await ask_all(gateway, tokens=80)
    await clients[0].reach(10)
    begun = [client for client in clients if client.tokens]
    assert 0 < len(begun) < len(clients)
    await pair.place(DRAINING, READY, drain=30.0)
    await check_all(clients)
    assert {client.attempt for client in begun} == {1}
    assert max(client.attempt for client in clients) == 2
    await pair.settled()


async def test_a_hand_over_that_is_taken_back(setting: Setting) -> None:
    pair, gateway = await start(setting)
    clients = await ask_all(gateway, tokens=150)
    await clients[0].reach(20)
    pair.workers[0].gate.clear()  # or it could be done before
    await pair.place(DRAINING, READY, drain=0.2)
    await eventually(lambda: clients[0].attempt == 2)
    pair.workers[0].gate.set()
    await pair.place(READY, DRAINING)
    await eventually(lambda: pair.workers[1].available == pair.workers[1].blocks)
    await pair.place(READY, None)
    await check_all(clients)
    await pair.settled()


async def test_entries_that_a_unit_has_lost_sight_of_are_handed_back(setting: Setting) -> None:
    """What it took with a pull that was cut off, or before its scheduler died, is pending under its name."""
    pair = await two_workers(setting)
    await pair.place(None, None)
    gateway = FakeGateway(setting.queue)
    client = await gateway.ask("a", PROMPTS[0], 40)
    # Before there is a scheduler, whose own pull could take it first.
    assert len(await setting.queue.pull({"a": 1}, "unit-0", 1000)) == 1
    running = await setting.scheduler()
    await gateway.attach(running.address)
    await eventually(lambda: len(running.scheduler.status()) == 2)
    await pair.place(DRAINING, READY)
    await check_all([client])
    await pair.settled()
    await gateway.detach()


async def test_a_place_that_is_gone_without_a_word(setting: Setting) -> None:
    """Its worker died: the document drops the place at once."""
    pair, gateway = await start(setting)
    clients = await ask_all(gateway, tokens=100)
    await clients[0].reach(20)
    await pair.workers[0].stop()
    await pair.place(None, READY)
    await check_all(clients)
    await eventually(lambda: pair.workers[1].available == pair.workers[1].blocks)


async def test_requests_of_a_model_that_goes_to_sleep_wait_until_it_is_woken(setting: Setting) -> None:
    pair, gateway = await start(setting)
    clients = await ask_all(gateway, tokens=100)
    await clients[0].reach(20)
    pair.workers[0].gate.clear()  # or some could be done before
    await pair.place(ASLEEP, None)
    queue = RequestQueue(setting.redis)

    async def all_wait() -> bool:
        return await queue.depth("a") == len(clients)

    await eventually(all_wait)
    pair.workers[0].gate.set()
    await eventually(lambda: pair.workers[0].available == pair.workers[0].blocks)  # when its job has ended
    await pair.place(READY, None)
    await check_all(clients)
    await pair.settled()
