"""The placement as the gateway sees it."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from muxserve.common.errors import FailedPrecondition, NotFound, Unavailable
from muxserve.gateway.catalog import Catalog, served_models
from muxserve.gateway.tokenizer import TokenizerMissing
from muxserve.v1 import admin_pb2, inference_pb2
from tests.gateway.service import FAILED, LOADING, READY, placed

ASLEEP, DRAINING = inference_pb2.MODEL_STATE_ASLEEP, inference_pb2.MODEL_STATE_DRAINING


def placement(
    *units: list[admin_pb2.PlacedModel], unplaced: admin_pb2.PlacedModel | None = None
) -> admin_pb2.Placement:
    found = admin_pb2.Placement(epoch=1, units=[admin_pb2.Unit(models=models) for models in units])
    if unplaced is not None:
        found.unplaced.append(unplaced)
    return found


def test_a_model_with_replicas_is_as_ready_as_its_best_and_as_long_as_its_shortest() -> None:
    models = served_models(
        placement(
            [placed("a", "p", LOADING, context=10), placed("b", "p", FAILED, "no")],
            [placed("a", "p", READY, context=300), placed("b", "p", LOADING)],
            [placed("a", "p", READY, context=200)],
        )
    )
    assert (models["a"].state, models["a"].shape.context_length) == (READY, 200)
    assert models["b"].state == LOADING


async def test_finding_a_model() -> None:
    catalog = Catalog(ThreadPoolExecutor(1), lambda: None)
    with pytest.raises(Unavailable):
        catalog.admit("a", 60)
    catalog.update(admin_pb2.Placement())
    with pytest.raises(Unavailable):
        catalog.admit("a", 60)
    catalog.check("a")
    assert not catalog.any_served
    catalog.update(placement([placed("a", "p")], unplaced=placed("big", "p", FAILED, "needs 9 GiB")))
    assert catalog.admit("a", 60).name == "a" and catalog.any_served
    with pytest.raises(FailedPrecondition, match="needs 9 GiB"):
        catalog.admit("big", 60)
    with pytest.raises(NotFound, match="there are a, big"):
        catalog.admit("b", 60)
    catalog.update(placement([placed(f"m{number}", "p") for number in range(1000)]))
    with pytest.raises(NotFound) as caught:
        catalog.admit("b", 60)
    assert len(str(caught.value)) < 500


def sleeping(
    wait: float, room_in: float = 0.0, state: inference_pb2.ModelState.ValueType = ASLEEP
) -> admin_pb2.PlacedModel:
    model = placed("a", "p", state)
    model.expected_wait_seconds = wait
    model.room_at_unix_ms = round((time.time() + room_in) * 1000) if room_in else 0
    return model


@pytest.mark.parametrize("state", [ASLEEP, LOADING])
async def test_a_model_that_is_asleep_takes_who_can_wait_and_tells_others_how_long_it_takes(
    state: inference_pb2.ModelState.ValueType,
) -> None:
    """Whether it has been asked for or not: others may still join those who wait."""
    catalog = Catalog(ThreadPoolExecutor(1), lambda: None)
    catalog.update(placement([sleeping(2.0, 3.0, state)]))
    assert catalog.any_served
    assert catalog.admit("a", 5.1).state == ASLEEP
    with pytest.raises(Unavailable, match=r"asleep.* (5.00|4.9\d) s .*has 4.80 s") as caught:
        catalog.admit("a", 4.8)
    assert caught.value.retry_after == pytest.approx(5.0, abs=0.2)
    (model,) = await catalog.describe_all()
    assert model.state == ASLEEP and model.expected_wait_seconds == pytest.approx(5.0, abs=0.2)


async def test_where_pinned_models_leave_no_room_nobody_is_left_waiting() -> None:
    catalog = Catalog(ThreadPoolExecutor(1), lambda: None)
    catalog.update(placement([sleeping(math.inf)]))
    with pytest.raises(Unavailable, match="pinned"):
        catalog.admit("a", 1e9)


def test_of_several_places_the_one_that_serves_soonest_counts() -> None:
    models = served_models(placement([sleeping(9.0)], [sleeping(2.0)], [sleeping(1.0, 60.0)]))
    assert (models["a"].state, models["a"].expected_wait(time.time())) == (ASLEEP, 2.0)
    assert served_models(placement([sleeping(9.0)], [placed("a", "p")]))["a"].state == READY
    assert served_models(placement([placed("a", "p", DRAINING)]))["a"].state == ASLEEP


async def test_one_checkpoint_is_read_once_for_all_its_names(tmp_path: Path, smollm2: Path) -> None:
    catalog = Catalog(ThreadPoolExecutor(1), lambda: None)
    catalog.update(placement([placed("a", smollm2), placed("b", smollm2), placed("c", tmp_path)]))
    a, b = await asyncio.gather(*(catalog.tokenizer(catalog.find(name)) for name in "ab"))
    assert a is b
    for _ in range(2):
        with pytest.raises(TokenizerMissing, match='model "c"'):
            await catalog.tokenizer(catalog.find("c"))
    catalog.update(placement([placed("b", smollm2)]))
    assert await catalog.tokenizer(catalog.find("b")) is a
