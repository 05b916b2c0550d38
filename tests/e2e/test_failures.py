"""What dies, and what users see: every stream goes on, with exactly the text of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from muxserve.client import AsyncClient
from tests.e2e.conftest import Cluster, running

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was",
    "def fibonacci(n):",
    "The three laws of thermodynamics are",
]
TOKENS = 120


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, tiny: Path) -> Iterator[Cluster]:
    """A cluster of this module's own, since its processes will be killed."""
    models = ("--model", f"a={smollm2},dtype=float32", "--model", f"b={tiny},dtype=float32")
    with running(tmp_path_factory.mktemp("fragile"), *models, "--arena", "256MiB") as up:
        yield up


@pytest.fixture
async def client(fragile: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fragile.gateway) as client:
        yield client


async def answer(client: AsyncClient, model: str, prompt: str, begun: asyncio.Event | None = None) -> Answer:
    """Stream one answer; `begun` is set once it is under way (8 tokens)."""
    stream = client.stream(
        model, prompt, max_tokens=TOKENS, temperature=0.7, seed=5, ignore_eos=True, timeout=90
    )
    text = ""
    tokens: list[int] = []
    async with stream:
        async for chunk in stream:
            text += chunk.text
            tokens += chunk.token_ids
            if begun is not None and len(tokens) >= 8:
                begun.set()
    return Answer(text, tuple(tokens))


async def eight(client: AsyncClient, kill: tuple[Cluster, str] | None = None) -> list[Answer]:
    """Eight streams over both models; with `kill`, that process is killed once all of them are under way."""
    begun = [asyncio.Event() for _ in range(8)]
    jobs = [(model, prompt) for model in "ab" for prompt in PROMPTS]
    work = [
        asyncio.create_task(answer(client, model, prompt, event))
        for (model, prompt), event in zip(jobs, begun, strict=True)
    ]
    if kill is not None:
        victim = await asyncio.to_thread(kill[0].pid, kill[1])
        await asyncio.gather(*(event.wait() for event in begun))
        os.kill(victim, signal.SIGKILL)
    return list(await asyncio.gather(*work))


@pytest.fixture(scope="module")
def undisturbed(fragile: Cluster) -> list[Answer]:
    """What the eight streams say when nothing dies."""

    async def run() -> list[Answer]:
        async with AsyncClient(fragile.gateway) as client:
            return await eight(client)

    answers = asyncio.run(run())
    assert all(len(a.tokens) == TOKENS for a in answers)
    return answers


@pytest.mark.parametrize(
    "victim",
    ["decode", pytest.param("prefill", marks=pytest.mark.slow), "worker", "scheduler", "redis"],
)
@pytest.mark.timeout(240)
async def test_streams_survive_a_kill(
    fragile: Cluster, client: AsyncClient, undisturbed: list[Answer], victim: str
) -> None:
    before = await asyncio.to_thread(fragile.pid, victim)
    disturbed = await eight(client, kill=(fragile, victim))
    assert disturbed == undisturbed
    await asyncio.to_thread(fragile.wait_idle, 20.0)
    assert await asyncio.to_thread(fragile.pid, victim) != before


async def test_new_requests_are_served_after_every_kill(client: AsyncClient) -> None:
    assert len((await answer(client, "a", PROMPTS[0])).tokens) == TOKENS


@pytest.mark.parametrize("state", ["queued", "prefill", "decode"])
async def test_a_disconnect_frees_blocks_within_two_seconds(
    fragile: Cluster, client: AsyncClient, state: str
) -> None:
    crowd = 80 if state == "queued" else 1
    most = 200 if state == "queued" else 2000  # what so many could not be served in time is refused
    prompt = "word " * (3000 if state == "prefill" else 8)
    async with AsyncClient(fragile.gateway) as leaving:
        streams = [
            asyncio.create_task(_first_token(leaving, prompt, most, wait=state == "decode"))
            for _ in range(crowd)
        ]
        if state == "decode":
            await asyncio.gather(*streams)
        else:
            want = (lambda m: m["waiting"] > 0) if state == "queued" else (lambda m: m["blocks_held"] > 0)
            seen = asyncio.create_task(
                asyncio.to_thread(fragile.wait, state, lambda s: any(want(m) for m in s["models"]), 20.0)
            )
            await asyncio.wait([seen, *streams], return_when=asyncio.FIRST_COMPLETED)
            for stream in streams:
                if stream.done():
                    stream.result()  # raises what went wrong
            await seen
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.to_thread(fragile.wait_idle, 2.0)


async def _first_token(client: AsyncClient, prompt: str, most: int, *, wait: bool) -> None:
    stream = client.stream("a", prompt, max_tokens=most, temperature=0, ignore_eos=True)
    if wait:
        await anext(aiter(stream))
        return
    async for _ in stream:
        pass
