"""The placement as the gateway sees it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from muxserve.common.errors import FailedPrecondition, NotFound, Unavailable
from muxserve.gateway.catalog import Catalog, served_models
from muxserve.gateway.tokenizer import TokenizerMissing
from muxserve.v1 import admin_pb2
from tests.gateway.service import FAILED, LOADING, READY, placed


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
        catalog.ready("a")
    catalog.update(admin_pb2.Placement())
    with pytest.raises(Unavailable):
        catalog.ready("a")
    assert not catalog.any_ready
    catalog.update(placement([placed("a", "p")], unplaced=placed("big", "p", FAILED, "needs 9 GiB")))
    assert catalog.ready("a").name == "a" and catalog.any_ready
    with pytest.raises(FailedPrecondition, match="needs 9 GiB"):
        catalog.ready("big")
    with pytest.raises(NotFound, match="there are a, big"):
        catalog.ready("b")
    catalog.update(placement([placed(f"m{number}", "p") for number in range(1000)]))
    with pytest.raises(NotFound) as caught:
        catalog.ready("b")
    assert len(str(caught.value)) < 500


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
