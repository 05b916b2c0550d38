"""`Experiment`: the flip with rebalancing on, with an operator, and static placements beside them."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from benchmarks.online import judging
from benchmarks.online.arrangement import Loaded, by_turns, first_apart, first_on_all, fits
from benchmarks.online.deployment import Deployment, Setup, copies
from benchmarks.online.streams import Run, Stream, send
from muxserve.bench.generator import Generator, Limits
from muxserve.bench.latency import Slo, calibrate, fit
from muxserve.bench.targets import target
from muxserve.bench.workload import Lengths, Mix, Request, popularity, shifted
from muxserve.bench.workload import Stream as Kind
from muxserve.engine.checkpoint import open_checkpoint

ROOM = 3
"""Models whose weights a worker has room for."""
AGAIN = 5.0
"""Seconds after which the operator asks for a rebalancing again."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Times are seconds."""

    models: tuple[str, ...] = ("m0", "m1", "m2", "m3", "m4", "m5")
    alpha: float = 2.1
    load: float = 0.5
    """Rate, in parts of what is served when too much arrives."""
    flood: float = 20.0
    before: float = 90.0
    after: float = 120.0
    """What arrives then is the same in all runs."""
    settled: float = 60.0
    """From the flip on: what arrives from then on is compared."""
    by_hand_before: float = 30.0
    reaction: float = 10.0
    """Seconds from the flip until the operator does something."""
    width: float = 15.0
    """Of the windows that goodput is taken of."""
    slo_scale: float = 8.0
    scale: float = 0.1
    """Of ShareGPT's lengths."""
    arena: int = 256 * 2**20
    seed: int = 7
    drain: float = 90.0
    """For what is left at the end."""

    @property
    def lengths(self) -> Lengths:
        """Of prompts and outputs."""
        return Lengths(context=1024).scaled(self.scale)

    def mix(self, order: Sequence[str]) -> Mix:
        """Traffic with the most popular model first."""
        shares = popularity(order, self.alpha)
        return Mix(tuple(Kind(model, share, self.lengths) for model, share in shares.items()))


QUICK = Plan(
    flood=10.0,
    before=35.0,
    after=90.0,
    settled=45.0,
    by_hand_before=12.0,
    width=12.0,
)


@dataclass(slots=True)
class Flip:
    """A run in which popularity changes."""

    run: Run
    flip: float
    end: float
    """Of arrivals."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Of the placement."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """When the operator asked for a rebalancing, and how many migrations that were."""


@dataclass(slots=True)
class Found:
    """What was measured."""

    rate: float
    slo: Slo
    by_advisor: Flip
    by_hand: Flip
    statics: dict[str, tuple[Loaded, list[Stream]]]
    """By name: where models were, and what became of the arrivals after the flip."""


class Experiment:
    """One run."""

    def __init__(self, plan: Plan, checkpoint: Path, folder: Path) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._folder = folder
        self._begun = time.monotonic()
        self._mixes = plan.mix(plan.models), plan.mix(plan.models[::-1])

    async def run(self, rate: float | None) -> Found:
        """Everything. `rate`: of arrivals; None: by `load`. Raises ContenderFailed, Failed."""
        plan = self._plan
        setup = self._setup()
        deployment = await Deployment.start(setup, self._folder / "by-advisor")
        try:
            slo = await self._slo(deployment)
            rate = rate or plan.load * await self._capacity(deployment)
            self.tell(f"{rate:.2f} requests/s")
            flip, begun_at = await self._by_advisor(deployment, rate)
            reached = await deployment.loaded()
        finally:
            await deployment.close()
        deployment = await Deployment.start(replace(setup, rebalance="off"), self._folder / "by-hand")
        try:
            await deployment.arrange(begun_at, ROOM)
            by_hand = await self._by_hand(deployment, rate)
            statics = await self._statics(deployment, rate, reached, begun_at)
        finally:
            await deployment.close()
        return Found(rate, slo, flip, by_hand, statics)

    def tell(self, line: str) -> None:
        """On standard error, with the time."""
        print(f"{time.monotonic() - self._begun:6.1f} s  {line}", file=sys.stderr, flush=True)

    def _setup(self) -> Setup:
        """Two workers with room for the weights of `ROOM` models each."""
        paths = copies(self._checkpoint, self._plan.models, self._folder / "models")
        weights = open_checkpoint(paths[self._plan.models[0]], "bfloat16").weight_bytes("panels")
        return Setup(paths, round((ROOM + 0.5) * weights), self._plan.arena)

    async def _slo(self, deployment: Deployment) -> Slo:
        gateway = target(deployment.gateway)
        try:
            mix = self._mixes[0]
            unloaded = fit(await calibrate(gateway, mix.streams[0], mix))
        finally:
            await gateway.close()
        return Slo(self._plan.slo_scale, dict.fromkeys(self._plan.models, unloaded))

    async def _capacity(self, deployment: Deployment) -> float:
        """Requests per second that are answered when far more arrive; placement gets used to them, too."""
        plan, mix = self._plan, self._mixes[0]
        gateway = target(deployment.gateway)
        try:
            requests = mix.poisson(60.0, plan.flood, plan.seed + 1)
            generator = Generator(requests, dict.fromkeys(plan.models, gateway), limits=Limits(drain=0.0))
            run = await generator.run()
        finally:
            await gateway.close()
        tokens = run.token_rate(round(plan.flood / 3), round(plan.flood))
        found = tokens / mix.mean_output(plan.seed)
        self.tell(f"flooded: {tokens:.0f} tokens/s, {found:.1f} requests/s")
        return found

    def _flipping(self, rate: float, before: float) -> list[Request]:
        """Arrivals of which the popularity flips after `before`."""
        old = self._mixes[0].poisson(rate, before, self._plan.seed)
        return [*old, *shifted(self._after(rate), before)]

    def _after(self, rate: float) -> list[Request]:
        """What arrives from the flip on, in every run."""
        return self._mixes[1].poisson(rate, self._plan.after, self._plan.seed + 2)

    async def _by_advisor(self, deployment: Deployment, rate: float) -> tuple[Flip, Loaded]:
        """The flip, and where models were right before it."""
        plan = self._plan
        flip = Flip(Run(time.monotonic()), plan.before, plan.before + plan.after)
        requests = self._flipping(rate, plan.before)
        found, before = await asyncio.gather(
            self._watched(deployment, flip, requests), self._at(flip, deployment)
        )
        self.tell(f"by the advisor: {judging.accounts(found.run.streams)}")
        return found, before

    async def _at(self, flip: Flip, deployment: Deployment) -> Loaded:
        """Where models are when popularity flips: each one somewhere, with no migration under way."""
        await asyncio.sleep(flip.run.begin + flip.flip - time.monotonic())
        loaded = await deployment.loaded()
        units = await deployment.workers()
        whole = all(loaded.values()) and fits(loaded, ROOM)
        return loaded if whole else by_turns(self._plan.models, units)

    async def _by_hand(self, deployment: Deployment, rate: float) -> Flip:
        """The flip, and an operator who asks for a rebalancing some time after it, and again."""
        plan = self._plan
        flip = Flip(Run(time.monotonic()), plan.by_hand_before, plan.by_hand_before + plan.after)
        requests = self._flipping(rate, plan.by_hand_before)
        operator = asyncio.create_task(self._operate(deployment, flip))
        try:
            await self._watched(deployment, flip, requests)
        finally:
            operator.cancel()
            with suppress(asyncio.CancelledError):
                await operator
        self.tell(f"by hand: {judging.accounts(flip.run.streams)}, asked: {flip.asked}")
        return flip

    async def _operate(self, deployment: Deployment, flip: Flip) -> None:
        due = flip.flip + self._plan.reaction
        while True:
            await asyncio.sleep(flip.run.begin + due - time.monotonic())
            asked: dict[str, Any] = {"at": round(time.monotonic() - flip.run.begin, 3)}
            try:
                asked["migrations"] = await deployment.rebalance()
            except grpc.aio.AioRpcError as error:
                asked["error"] = error.details()
            flip.asked.append(asked)
            due = time.monotonic() - flip.run.begin + AGAIN

    async def _watched(self, deployment: Deployment, flip: Flip, requests: Sequence[Request]) -> Flip:
        watching = asyncio.create_task(deployment.watch(flip.run.begin, flip.history))
        try:
            await send(deployment.gateway, requests, flip.run, self._plan.drain)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        return flip

    async def _statics(
        self, deployment: Deployment, rate: float, reached: Loaded, before: Loaded
    ) -> dict[str, tuple[Loaded, list[Stream]]]:
        """What became of the arrivals after the flip, by placement: the one that the advisor came to, those
        that are worth trying, and the one from before the flip."""
        order, workers = self._plan.models[::-1], await deployment.workers()
        candidates = {"by advisor": reached} if all(reached.values()) else {}
        if (both := first_on_all(await deployment.loaded(), order, workers, ROOM)) is not None:
            candidates["first on both"] = both
        candidates["first apart"] = first_apart(order, workers, ROOM)
        candidates["by turns"] = by_turns(order, workers)
        candidates["as before"] = before
        found: dict[str, tuple[Loaded, list[Stream]]] = {}
        for name, wanted in candidates.items():
            if fits(wanted, ROOM) and all(wanted != other for other, _ in found.values()):
                await deployment.arrange(wanted, ROOM)
                found[name] = (wanted, await self._static(deployment, rate, name))
        return found

    async def _static(self, deployment: Deployment, rate: float, name: str) -> list[Stream]:
        plan, run = self._plan, Run(time.monotonic())
        await send(deployment.gateway, self._after(rate), run, plan.drain)
        self.tell(f"static, {name}: {judging.accounts(run.streams)}")
        return run.streams
