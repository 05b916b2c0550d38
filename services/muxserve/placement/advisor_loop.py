"""`Rebalancer`: watches traffic, says what would be better, and has it done where that is worthwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from uuid import uuid4

import structlog

from muxserve.common.errors import FailedPrecondition, ServiceError, Unavailable
from muxserve.placement import advisor_view as view
from muxserve.placement.advisor import Advice, Options, advise
from muxserve.placement.advisor_situation import Move, Served
from muxserve.placement.advisor_watch import Watch
from muxserve.placement.reconcile import Reconciler
from muxserve.placement.settings import PlacementSettings
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

LOOK = 1.0
"""Seconds between looks at the counters."""
LEAST = 8.0
"""Seconds of traffic before anything is moved by itself."""

Start = Callable[[Sequence[Move], str], None]
"""Begins migrations, in order, for a reason. Raises ServiceError where that cannot be."""


def starter(reconciler: Reconciler, settings: PlacementSettings) -> Start:
    """Has `reconciler` carry moves out."""

    def start(moves: Sequence[Move], reason: str) -> None:
        plan = reconciler.plan
        if plan is None:
            raise Unavailable("the placement is not known yet")
        if plan.under_way:
            raise FailedPrecondition("migrations are under way")
        plan.planned += [
            admin_pb2.Migration(
                id=uuid4().hex[:12],
                model=move.model,
                source_worker=move.source,
                target_worker=move.target,
                phase=admin_pb2.MIGRATION_PHASE_PLANNED,
                author="rebalance",
                reason=reason,
                began_unix_ms=round(time.time() * 1000),
                drain_seconds=settings.drain_seconds,
            )
            for move in moves
        ]
        reconciler.wake()

    return start


class Rebalancer:
    """Of a placement service."""

    def __init__(
        self,
        settings: PlacementSettings,
        placement: Callable[[], admin_pb2.Placement],
        watch: Watch,
        start: Start,
    ) -> None:
        """`placement`: the one in force."""
        self._settings = settings
        self._options = Options(horizon=settings.rebalance_horizon)
        self._placement = placement
        self._watch = watch
        self._start = start

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        due, away = loop.time() + self._settings.rebalance_interval, False
        while True:
            await asyncio.sleep(LOOK)
            try:
                await self._watch.look(self._placement())
                away = False
            except Unavailable as error:
                if not away:
                    log.warning("traffic is not watched", reason=str(error))
                away = True
                continue
            if self._settings.rebalance == "auto" and loop.time() >= due:
                await self._consider()
                due = loop.time() + self._settings.rebalance_interval

    async def plan(self) -> admin_pb2.PlanResponse:
        """What would be done now if somebody asked for it, and what is known of traffic: who asks does so
        because something has changed, and bursts are believed. Raises Unavailable while Redis is away."""
        await self._watch.look(self._placement())
        placement = self._placement()
        models = self._watch.models(placement, rest=0.0, believe=True)
        advice = await self._advise(placement, models, self._options.asked())
        return view.response(advice, models, self._watch.traffic)

    async def _consider(self) -> None:
        placement = self._placement()
        if placement.HasField("migration") or placement.planned:
            return
        models = self._watch.models(placement, self._settings.rebalance_rest)
        advice = await self._advise(placement, models, self._options)
        if not advice.worthwhile or max(model.flow.seconds for model in models) < LEAST:
            return
        if self._placement().epoch != placement.epoch:  # it has changed meanwhile: look again
            return
        log.info(
            "rebalancing",
            reason=advice.reason,
            served=round(advice.served, 3),
            after=round(advice.after, 3),
            cost=round(advice.cost, 2),
            moves=[f"{move.model}: {move.source or '-'} > {move.target or '-'}" for move in advice.moves],
        )
        try:
            self._start(advice.moves, advice.reason)
        except ServiceError as error:
            log.warning("not rebalanced", reason=str(error))

    async def _advise(
        self, placement: admin_pb2.Placement, models: Sequence[Served], options: Options
    ) -> Advice:
        """In a thread: it may take some tenths of a second."""
        advice = await asyncio.to_thread(advise, self._watch.workers(placement), models, options)
        moves = between_workers(advice.moves, models)
        return replace(advice, moves=moves, worthwhile=advice.worthwhile and bool(moves))


def between_workers(moves: Sequence[Move], models: Sequence[Served]) -> tuple[Move, ...]:
    """`moves` without those that only wake a model that sleeps everywhere. Who is loaded on a worker, of
    those that have a place there, is for `Residency`, by turns; so nothing is left of moves that would have
    put a model to sleep for another there."""
    loaded = {model.name: set(model.loaded) for model in models}
    places = {model.name: set(model.loaded | model.asleep) for model in models}
    kept, slept = [], set()
    for move in moves:
        awake, there = loaded[move.model], places[move.model]
        if not awake and not move.source and move.target in there:
            continue
        kept.append(move)
        if awake == {move.source} and not move.target:
            slept.add(move.model)  # its last place stays, asleep
            awake.clear()
            continue
        slept.discard(move.model)
        if not move.source or move.source in awake:
            awake.add(move.target)
        there.add(move.target)
        awake.discard(move.source)
        there.discard(move.source)
    return () if slept else tuple(kept)
