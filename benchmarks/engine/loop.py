"""`Loop`: what a worker does with one model, without services, while requests never end."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import psutil

from benchmarks.engine.cohort import Options, Request, make_cohort
from benchmarks.engine.unit import Served, Unit, layout_of, open_model
from muxserve.engine.messages import (
    UNFINISHED,
    DecodeJob,
    DecodeRow,
    PrefillChunk,
    PrefillJob,
    Step,
)
from muxserve.engine.pool import OutOfBlocks

MODEL = "m"
LEASE = 8
"""Steps of a decode job, as the scheduler grants them."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is done, and when."""

    number: int
    at: float
    wall_per_token_s: float
    cpu_per_token_s: float
    tokens: int
    counted: bool
    same_text: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """The state of things after some hundreds of requests."""

    ended: int
    at: float
    cpu_s: float
    tokens: int
    """Of texts, so far."""
    resident_bytes: int
    descriptors: int
    threads: int


class Loop:
    """Admits, prefills, leases, frees."""

    def __init__(self, options: Options) -> None:
        self._options = options
        checkpoint = open_model(options.model)
        layout = layout_of(checkpoint.spec, options.block_bytes)
        longest = options.longest_prompt + options.longest_text
        mean = (options.shortest_prompt + options.longest_prompt) / 2 + options.longest_text / 4
        groups = max(2 * layout.spans(longest), int(options.streams * (mean / layout.tokens_per_block + 0.5)))
        self._unit = Unit(groups * layout.blocks_per_span, options.block_bytes, options.threads)
        self._pool = self._unit.pool
        slots = groups  # every sequence has one at least
        self._model: Served = self._unit.add(MODEL, checkpoint, slots, longest)
        self._cohort = make_cohort(options, checkpoint.spec.vocab_size)
        self._texts: dict[int, list[int]] = {}
        self._process = psutil.Process()
        self._live: list[Request] = []
        self._back: deque[Request] = deque()
        self._next = 0
        self._jobs = 0
        self._counting = True
        self.done: list[Ended] = []
        self.marks: list[Mark] = []
        self.used: list[float] = []
        """Of the pool, at each lease from the first mark on."""
        self.recomputed = 0

    def run(self) -> None:
        """Until so many requests have been counted and all have ended."""
        options = self._options
        counted = 0
        while counted < options.requests:
            self._grow()
            self._admit()
            if not self.marks and self._held() >= options.target - 0.05:
                self._mark(0)
            self._lease()
            if self.marks:
                self.used.append(self._held())
            for ended in self._retire():
                counted += ended
                if ended and counted % options.cohort == 0:
                    self._mark(counted)
        self._counting = False
        while self._live or self._back:
            self._grow()
            self._prefill(self._resume())
            self._lease()
            self._retire()

    def check(self) -> None:
        """Raises what is wrong with the books; all blocks must be free."""
        self._pool.check_integrity()
        self._model.tables.check_integrity()
        if self._pool.free_blocks != self._pool.blocks:
            raise AssertionError(f"{self._pool.blocks - self._pool.free_blocks} blocks were not given back")

    def close(self) -> None:
        self._unit.close()

    @property
    def blocks(self) -> int:
        return self._pool.blocks

    def _new(self) -> Request:
        like = self._cohort[self._next % len(self._cohort)]
        self._next += 1
        return Request(like.number, like.prompt, like.limit, like.sampling)

    def _held(self) -> float:
        return 1 - self._pool.free_blocks / self._pool.blocks

    def _admit(self) -> None:
        """New ones up to the target, and their prompts."""
        came = self._resume()
        while not self._back:
            request = self._new()
            if not self._fits(request):
                self._next -= 1
                break
            came.append(self._open(request))
        self._prefill(came)

    def _resume(self) -> list[Request]:
        """Those that had to give their blocks back."""
        came = []
        while self._back and self._fits(self._back[0]):
            came.append(self._open(self._back.popleft()))
        return came

    def _fits(self, request: Request) -> bool:
        groups = self._model.layout.spans(self._next_length(request))
        after = self._held() + groups * self._model.layout.blocks_per_span / self._pool.blocks
        return after <= self._options.target or not self._live

    def _open(self, request: Request) -> Request:
        request.admitted = request.admitted or time.perf_counter()
        request.slot = self._model.tables.acquire(request.number)
        request.spans = 0
        self._cover(request)
        self._model.tables.tokens[request.slot, : request.length] = [*request.prompt, *request.text]
        self._live.append(request)
        return request

    @staticmethod
    def _next_length(request: Request) -> int:
        """Tokens whose KV is there after the next lease, and after the prompt if that is to be read first."""
        return min(request.length + LEASE, request.limit - 1)

    def _cover(self, request: Request) -> None:
        """Blocks for the next lease. Raises OutOfBlocks."""
        wanted = self._model.layout.spans(self._next_length(request))
        if wanted > request.spans:
            ids = self._pool.allocate(MODEL, wanted - request.spans)
            self._model.tables.assign(request.slot, request.spans, ids)
            request.spans = wanted

    def _free(self, request: Request) -> None:
        self._pool.free(MODEL, self._model.tables.groups(request.slot, request.spans))
        self._model.tables.release(request.slot)
        self._live.remove(request)

    def _prefill(self, came: list[Request]) -> None:
        for request in came:
            chunk = PrefillChunk(request.slot, 0, request.length, request.limit, request.sampling)
            self._run(PrefillJob(self._jobs, MODEL, (chunk,)), [request])

    def _grow(self) -> None:
        """Blocks for the next lease of all that live; the newest make room."""
        going = 0
        while going < len(self._live):
            try:
                self._cover(self._live[going])
                going += 1
            except OutOfBlocks:
                newest = self._live[-1]
                self._free(newest)
                newest.recomputed = True
                self.recomputed += 1
                self._back.append(newest)

    def _lease(self) -> None:
        """One decode job over all that live."""
        rows = tuple(DecodeRow(r.slot, r.length, r.limit, r.sampling) for r in self._live if not r.ended)
        if rows:
            self._run(DecodeJob(self._jobs, MODEL, rows, LEASE), self._live)

    def _run(self, job: PrefillJob | DecodeJob, requests: list[Request]) -> None:
        self._jobs += 1
        slots = {request.slot: request for request in requests}
        begun = time.process_time()
        for step in self._unit.runner.run(job):
            now = time.process_time()
            self._take(step, slots, (now - begun) / len(step.slots))
            begun = now

    @staticmethod
    def _take(step: Step, slots: dict[int, Request], cpu_s: float) -> None:
        if step.failed:
            raise AssertionError(f"logits of slots {step.failed} are not finite")
        for slot, token, finished in zip(step.slots, step.tokens, step.finished, strict=True):
            request = slots[slot]
            request.text.append(token)
            request.ended = finished != UNFINISHED
            request.cpu_s += cpu_s

    def _retire(self) -> list[bool]:
        """Free those that have ended; for each, whether it counts."""
        ended = [request for request in self._live if request.ended]
        now = time.perf_counter()
        for request in ended:
            self._free(request)
            # A recomputed sequence is rounded in other places: its text may differ.
            if not request.recomputed:
                self._texts.setdefault(request.number, request.text)
            counted = self._counting and bool(self.marks) and request.admitted >= self.marks[0].at
            count = len(request.text)
            self.done.append(
                Ended(
                    request.number,
                    now,
                    (now - request.admitted) / count,
                    request.cpu_s / count,
                    count,
                    counted,
                    request.recomputed or request.text == self._texts[request.number],
                )
            )
        return [one.counted for one in self.done[len(self.done) - len(ended) :]]

    def _mark(self, ended: int) -> None:
        self.marks.append(
            Mark(
                ended,
                time.perf_counter(),
                time.process_time(),
                sum(one.tokens for one in self.done) + sum(len(request.text) for request in self._live),
                self._process.memory_info().rss,
                self._process.num_fds(),
                self._process.num_threads(),
            )
        )
