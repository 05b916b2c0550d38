"""An arena far too small for the load: sequences are preempted and recomputed; the text does not change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxserve.client import AsyncClient
from tests.e2e.conftest import Cluster, running

TOKENS = 40
PROMPTS = 8
"""Different prompts; of each, four requests run together in each model."""


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, tiny: Path) -> Iterator[Cluster]:
    models = ("--model", f"a={smollm2},dtype=float32", "--model", f"b={tiny},dtype=float32")
    with running(tmp_path_factory.mktemp("cramped"), *models, "--arena", "24MiB") as up:
        yield up


@pytest.mark.timeout(400)
async def test_64_requests_over_two_models_finish_with_the_text_they_have_alone(cramped: Cluster) -> None:
    async with AsyncClient(cramped.gateway) as client:

        async def text(model: str, number: int) -> str:
            prompt = f"Number {number} of the list is the story of a " + "very " * number + "old man"
            result = await client.generate(
                model, prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True, timeout=300
            )
            assert result.usage.completion_tokens == TOKENS
            return result.text

        work = [(model, number) for number in range(PROMPTS) for model in "ab"]
        together = await asyncio.gather(*(text(*w) for w in work * 4))
        alone = [await text(*w) for w in work]
    assert together == alone * 4
    status = await asyncio.to_thread(cramped.wait_idle)
    assert sum(m["preemptions"] for m in status["models"]) > 0
