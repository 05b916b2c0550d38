"""`Unit`: the requests of one unit, from their delivery to their end. Never waits for anybody.

    delivered ─► waiting ─► prefilling ─► running ─► finished
        │           ▲            │            │
        └► awaiting resume       └── lost or preempted: back to waiting, in the order of arrival

Requests of a model that leaves the unit, or goes to sleep, are handed back: what waits at once, what runs
when its time is over.

Everything that happens (deliveries, cancels, the worker's messages, timers) changes state at once and asks
for one turn of the policy, which comes when the event loop has heard what else there is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

import structlog
from google.rpc import code_pb2

from muxserve.common.queue import Delivery
from muxserve.scheduler import snapshot
from muxserve.scheduler.acks import Acknowledger
from muxserve.scheduler.gateways import GatewayHub
from muxserve.scheduler.policy.interface import (
    AdaptQuotas,
    AskAgain,
    Decision,
    DecodeJob,
    EndLease,
    Finished,
    Policy,
    Preempt,
    PrefillJob,
    Refuse,
)
from muxserve.scheduler.reports import Reports
from muxserve.scheduler.requests import Clock, Event, Request
from muxserve.scheduler.seats import Seats, Send
from muxserve.scheduler.tally import Tally
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2, scheduler_pb2, worker_pb2

log = structlog.get_logger(__name__)

RESUME_GRACE = 10.0
"""Seconds that an attached gateway has to answer a resume query."""
FAILED = inference_pb2.MODEL_STATE_FAILED
LEAVING = (inference_pb2.MODEL_STATE_DRAINING, inference_pb2.MODEL_STATE_ASLEEP)
AHEAD = 16
"""Requests that wait here at most, as a multiple of their model's slots: so many that one tenant may send at
once without keeping those of others from here, where they go first."""
SHARED = 12
"""Requests of a model that wait here at most while other units serve it too: what waits in the queue goes to
whoever can take it first, which is what divides load among units."""
SHORTEST_YIELD, YIELD, LONGEST_YIELD = 0.02, 0.005, 0.2
"""Seconds for which a unit that has something to do leaves requests that other units may take too to those
that have less: at least, so many more for each request that it has, and at most."""


class Unit:
    """One unit's state machine. Lives in the event loop's thread."""

    def __init__(
        self, name: str, policy_name: str, policy: Policy, hub: GatewayHub, acks: Acknowledger
    ) -> None:
        self.name = name
        self.seats = Seats()
        self.quotas: dict[str, int] = {}
        self.quota_revision = 0
        self.quotas_in_force: worker_pb2.QuotasInForce | None = None
        """What the worker says became of them; of its Jobs stream, so of a revision of this unit's."""
        self.on_change: Callable[[], None] = lambda: None
        """Called after every turn: room in the queues or quotas may have changed."""
        self.handed_back: set[str] = set()
        """Models with entries that are this unit's in the queue and are not to be."""
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the error of a turn that failed: a defect, after which this unit cannot go on."""
        self._policy_name = policy_name
        self._policy = policy
        self._hub = hub
        self._acks = acks
        self._configs: dict[str, common_pb2.ModelConfig] = {}
        self._leaving: dict[str, float] = {}
        """Models that take no requests any more, and the loop time when what runs is handed back."""
        self._elsewhere: Collection[str] = ()
        self._requests: dict[str, Request] = {}
        self._by_number: dict[int, Request] = {}
        self._ending: set[tuple[str, str]] = set()
        """(model, entry) of finished requests that are not acknowledged yet."""
        self._turn_due = False
        self._clock = Clock.now(asyncio.get_running_loop())
        self._ask_again: asyncio.TimerHandle | None = None
        self._tally = Tally()
        self._reports = Reports(self, self.seats, policy, hub, self._tally)

    # Models and quotas

    def place(self, unit: admin_pb2.Unit, elsewhere: Collection[str]) -> None:
        """Take the unit's part of the placement. `elsewhere`: models that other units serve. Requests of
        models that are nowhere, or failed, fail."""
        placed = {m.config.name: m for m in unit.models}
        self._configs = {name: m.config for name, m in placed.items() if m.state != FAILED}
        self._elsewhere = elsewhere
        loop = asyncio.get_running_loop()
        self._leaving = {
            name: self._clock.loop(m.drain_until_unix_ms) for name, m in placed.items() if m.state in LEAVING
        }
        for at in set(self._leaving.values()):
            loop.call_at(max(at, loop.time()), self.ask_turn)
        for request in list(self._requests.values()):
            if request.model in self._configs:
                continue
            if request.model in elsewhere:
                self._hand_back(request)
            elif request.model in placed:
                reason = placed[request.model].reason
                self.fail(request, code_pb2.UNAVAILABLE, f"the model failed: {reason}")
            else:
                self.fail(request, code_pb2.NOT_FOUND, f'no model named "{request.model}"')
        self.quotas = {name: blocks for name, blocks in self.quotas.items() if name in self._configs}
        self.ask_turn()

    @property
    def models(self) -> list[str]:
        """Models placed here."""
        return sorted(self._configs)

    @property
    def size(self) -> int:
        """Requests that it has."""
        return len(self._requests)

    def serves(self, model: str) -> bool:
        """Whether it takes requests: the worker is there and has loaded it, and it stays."""
        placed = model in self._configs and model not in self._leaving
        return placed and self.seats.connected and model in self.seats.shapes

    def leaves(self, model: str) -> bool:
        """Whether its requests are handed back."""
        return model in self._leaving

    def room(self, model: str) -> int:
        """Requests of `model` to pull from its queue now. What is not here cannot be refused in time, nor go
        before others."""
        if not self.serves(model):
            return 0
        waiting = sum(r.sequence is None for r in self._requests.values() if r.model == model)
        most = AHEAD * self.seats.shapes[model].slots
        return max(0, (min(SHARED, most) if model in self._elsewhere else most) - waiting)

    def yields(self, model: str) -> float:
        """Seconds for which requests of `model` in its queue are left to units that have less to do."""
        if model not in self._elsewhere or not self._requests:
            return 0.0
        return min(LONGEST_YIELD, SHORTEST_YIELD + YIELD * len(self._requests))

    def known(self, model: str) -> set[str]:
        """Entries of `model` that are in good hands."""
        live = {r.entry_id for r in self._requests.values() if r.model == model}
        ending = {entry_id for name, entry_id in self._ending if name == model}
        return live | ending | self._acks.pending(model)

    def status(self) -> scheduler_pb2.UnitStatus:
        """For operators."""
        return self._tally.status(
            self.name,
            self._policy_name,
            self.seats.connected,
            {name: self.quotas.get(name, 0) for name in self.models},
            self._requests.values(),
        )

    def set_quotas(self, blocks: Mapping[str, int], revision: int) -> None:
        """Put quotas in force."""
        self.quotas = {name: count for name, count in blocks.items() if name in self._configs}
        self.quota_revision = revision
        self._send_quotas()
        self.ask_turn()

    # Requests

    def deliver(self, delivery: Delivery) -> None:
        """A request from the queue."""
        if delivery.model in self._leaving or not self._has(delivery.model):
            self.handed_back.add(delivery.model)
            self.ask_turn()
            return
        request = Request.from_delivery(self._hub.new_number(), delivery, self._clock)
        if (before := self._requests.get(request.id)) is not None:
            if before.entry_id == delivery.entry_id:
                before.attempt = max(before.attempt, delivery.attempt)
            else:  # an admission that was tried twice: the first one lives
                self._acks.add(delivery.model, delivery.entry_id)
            return
        self._requests[request.id] = self._by_number[request.number] = request
        loop = asyncio.get_running_loop()
        if request.model not in self._configs:
            self.fail(request, code_pb2.NOT_FOUND, f'no model named "{request.model}"')
            return
        if misfit := self._misfit(request):
            self.fail(request, code_pb2.INVALID_ARGUMENT, misfit)
            return
        if deadline := request.queued.deadline_unix_ms:
            left = deadline / 1000 - time.time()
            if left <= 0:
                self._expire(request)
                return
            request.timer = loop.call_later(left, self._expire, request)
        if request.awaiting_resume:
            loop.call_later(RESUME_GRACE, self._give_up_resume, request)
        self._hub.send(request.gateway, [request.started()])
        self.ask_turn()

    def _has(self, model: str) -> bool:
        """Whether its requests are for this unit to serve, or to turn away."""
        return model in self._configs or model not in self._elsewhere

    def _hand_back(self, request: Request) -> None:
        """Forget it; whoever serves its model goes on with it."""
        self._drop(request)
        self.handed_back.add(request.model)

    def _let_go(self) -> None:
        """Hand back what does not run, or must not any longer."""
        now = asyncio.get_running_loop().time()
        for request in [r for r in self._requests.values() if r.model in self._leaving]:
            if request.sequence is None or now >= self._leaving[request.model]:
                self._hand_back(request)

    def cancel(self, request_id: str) -> None:
        """See `RequestOwner`."""
        if (request := self._requests.get(request_id)) is not None:
            self._drop(request)
            self._acks.add(request.model, request.entry_id)

    def cancel_number(self, number: int) -> None:
        """See `RequestOwner`."""
        if (request := self._by_number.get(number)) is not None:
            self.cancel(request.id)

    def resume(self, answer: scheduler_pb2.AttachRequest.Resume) -> None:
        """See `RequestOwner`."""
        request = self._requests.get(answer.request_id)
        if request is None or not request.awaiting_resume or answer.attempt != request.attempt:
            return
        if answer.gone:
            self.cancel(request.id)
            return
        request.resume(list(answer.emitted_tokens))
        if finish := request.finished_by():
            event = request.tokens(request.resumed_at, finish)
            self._hub.send(request.gateway, [event])
            self.finish(request, event)
        self.ask_turn()

    def replay(self, gateway: str) -> list[Event]:
        """See `RequestOwner`."""
        mine = (r for r in self._requests.values() if r.gateway == gateway)
        return [event for request in mine for event in request.replay()]

    def gateway_lost(self, gateway: str) -> None:
        """See `RequestOwner`."""
        for request in [r for r in self._requests.values() if r.gateway == gateway]:
            self.cancel(request.id)
            event = request.failed(code_pb2.UNAVAILABLE, "the gateway was away for too long", 1.0)
            self._hub.finished(gateway, request.id, event, lambda: None)

    def abandon(self) -> None:
        """Somebody else runs this unit now and will claim its requests: forget them."""
        for request in list(self._requests.values()):
            self._drop(request)

    # The worker

    def connected(self, info: worker_pb2.WorkerInfo, send: Send) -> None:
        """The Jobs stream is open."""
        self.seats.connect(info, send)
        for request in list(self._requests.values()):
            if misfit := self._misfit(request):
                self.fail(request, code_pb2.INVALID_ARGUMENT, misfit)
        self.quotas_in_force = None
        self._send_quotas()
        self.ask_turn()

    def disconnected(self) -> None:
        """The Jobs stream has ended: all that ran waits again."""
        self.seats.disconnect()
        self.on_change()

    def handle(self, response: worker_pb2.JobsResponse) -> None:
        """A message of the worker."""
        match response.WhichOneof("kind"):
            case "step":
                self._reports.on_step(response.step)
            case "done":
                self._reports.on_done(response.done)
            case "nearing":
                self.seats.near(response.nearing.job)
                self.ask_turn()
            case "quotas":
                self.quotas_in_force = response.quotas
            case "info":
                self.seats.update(response.info)
                self.ask_turn()

    def _misfit(self, request: Request) -> str:
        """Why the request can never be served here, or nothing. Gateways have checked it against what they
        knew."""
        shape = self.seats.shapes.get(request.model)
        if not request.queued.prompt_tokens or not request.queued.max_tokens:
            return "prompt and max_tokens must not be empty"
        if shape is not None and request.limit > shape.context_length:
            return f"{request.limit} tokens are over the context of {shape.context_length}"
        return ""

    # Ends

    def _tell_end(self, request: Request, expired: bool = False) -> None:
        """Let the policy learn from it."""
        seconds = asyncio.get_running_loop().time() - request.arrival
        output, most = len(request.output), request.queued.max_tokens
        ended = Finished(request.number, request.model, output, most, seconds, expired)
        self._policy.observe(ended)

    def _expire(self, request: Request) -> None:
        self._tell_end(request, expired=True)
        self.fail(request, code_pb2.DEADLINE_EXCEEDED, "the request's deadline passed")

    def _give_up_resume(self, request: Request) -> None:
        if request.awaiting_resume and self._requests.get(request.id) is request:
            log.warning("no answer to a resume query; request dropped", request=request.id)
            self.cancel(request.id)

    def fail(self, request: Request, code: int, message: str, retry_after: float | None = None) -> None:
        """It cannot be served; `code` is a google.rpc.Code. `retry_after` in seconds."""
        if retry_after is None and code == code_pb2.UNAVAILABLE:
            retry_after = 1.0
        event = request.failed(code, message, retry_after)
        self._hub.send(request.gateway, [event])
        self.finish(request, event)

    def finish(self, request: Request, event: Event) -> None:
        """It is over and its gateway was sent `event`; acknowledged when that has surely arrived."""
        self._drop(request)
        if event.HasField("tokens"):
            self._tell_end(request)
            self._tally.answered(request)
        if event.HasField("tokens"):
            event = request.tokens(request.resumed_at, event.tokens.finish_reason)
        entry = (request.model, request.entry_id)
        self._ending.add(entry)

        def settle() -> None:
            self._ending.discard(entry)
            self._acks.add(*entry)

        self._hub.finished(request.gateway, request.id, event, settle)

    def _drop(self, request: Request) -> None:
        """Forget a request, wherever it is; what it holds at the worker is given back."""
        del self._requests[request.id], self._by_number[request.number]
        request.awaiting_resume = False
        if request.timer is not None:
            request.timer.cancel()
        if request.sequence is not None:
            self.seats.close([request.sequence])
        self.ask_turn()

    # Turns

    def ask_turn(self) -> None:
        """Let the policy decide once what is happening now has happened."""
        if not self._turn_due:
            self._turn_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        try:
            if self._leaving:
                self._let_go()
            if self.seats.connected:
                self._decide()
            self.on_change()
        except Exception as error:
            if not self.broken.done():
                self.broken.set_exception(error)

    def _decide(self) -> None:
        if self._ask_again is not None:
            self._ask_again.cancel()
        now = asyncio.get_running_loop().time()
        seen = snapshot.take(self.seats, self._requests.values(), self._configs, self.quotas, now)
        for decision in self._policy.decide(seen, now):
            self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case PrefillJob():
                self._tally.jobs["prefill"] += 1
                self.seats.prefill(decision, [self._by_number[c.sequence] for c in decision.chunks])
            case DecodeJob():
                self._tally.jobs["decode"] += 1
                numbers = *decision.sequences, *(chunk.sequence for chunk in decision.prompts)
                job = self.seats.decode(decision, [self._by_number[number] for number in numbers])
                if self.seats.ends_soon(job):  # the job that is to follow may be sent at once
                    self.ask_turn()
            case Preempt(number):
                request = self._by_number[number]
                self._tally.preemptions[request.model] += 1
                if request.sequence is not None:
                    self.seats.close([request.sequence])
            case Refuse(number, retry_after):
                self._refuse(self._by_number[number], retry_after)
            case AskAgain(at):
                self._ask_again = asyncio.get_running_loop().call_at(at, self.ask_turn)
            case EndLease(job):
                self.seats.end_lease(job)
                self.ask_turn()  # the one that is to follow may be sent at once
            case AdaptQuotas(quotas):
                self.quotas = dict(quotas)
                self.quota_revision += 1
                self._send_quotas()

    def _refuse(self, request: Request, retry_after: float) -> None:
        self._tally.refusals[request.model] += 1
        if retry_after:
            message = "there is more to do than could be done before the request's deadline"
            self.fail(request, code_pb2.RESOURCE_EXHAUSTED, message, retry_after)
        else:
            message = "the request needs more memory than its model has"
            self.fail(request, code_pb2.RESOURCE_EXHAUSTED, message)

    def _send_quotas(self) -> None:
        message = worker_pb2.SetQuotas(revision=self.quota_revision, blocks=self.quotas)
        self.seats.send(worker_pb2.JobsRequest(quotas=message))
