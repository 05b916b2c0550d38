"""`GatewayHub`: the gateways that are attached, and what they are still to be told.

A gateway's requests outlive a broken stream for a grace period; when it is back it gets everything again
that it may have missed. Events for a gateway that reads too slowly end its stream, so that it comes back
the same way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from muxserve.scheduler.requests import Event
from muxserve.v1 import scheduler_pb2

log = structlog.get_logger(__name__)

NewTokens = scheduler_pb2.NewTokens

GRACE = 5.0
"""Seconds that a gateway may be away before its requests are cancelled."""
FIRST_GRACE = 15.0
"""The same for one that has not been here since this scheduler began: it has to find the scheduler first."""
SETTLE = 2.0
"""Seconds after a request's last event, with its gateway attached all the while, until it counts as
delivered."""
KEEP = 30.0
"""Seconds that a finished request is kept at most for a gateway that may not have heard of it."""
MAX_KEPT = 4096
"""Finished requests kept per gateway."""
MAX_PENDING = 20_000
"""Events and tokens that a gateway may be behind before its stream is ended."""
MAX_BATCH_BYTES = 4 * 2**20
"""Bytes of one message, about."""


class RequestOwner(Protocol):
    """A unit: who has live requests."""

    def replay(self, gateway: str) -> list[Event]:
        """Everything to tell about its live requests of `gateway`."""

    def cancel(self, request_id: str) -> None:
        """Drop that request, if it is here."""

    def cancel_number(self, number: int) -> None:
        """Drop the request with that number, if it is here."""

    def resume(self, answer: scheduler_pb2.AttachRequest.Resume) -> None:
        """Go on with a request of an earlier attempt, if it is here."""

    def gateway_lost(self, gateway: str) -> None:
        """Drop the requests of `gateway`, and leave with the hub what it is to hear should it come back."""


@dataclass(slots=True)
class Final:
    """A finished request, until it counts as delivered."""

    event: Event
    """All that a gateway needs to finish it."""
    settle: Callable[[], None]
    """Acknowledges it."""
    since: float


class Attachment:
    """One Attach stream: what waits to be written to it."""

    def __init__(self, gateway: str, events: list[Event]) -> None:
        self.gateway = gateway
        self._waiting: deque[Event | NewTokens] = deque(events)
        self._behind = len(events)
        """Events and tokens that wait."""
        self._some = asyncio.Event()
        self._closed = False
        if events:
            self._some.set()

    def put(self, events: Sequence[Event], new: NewTokens | None = None) -> bool:
        """Add events, and tokens that are later than these. False: there is too much already, nothing was
        added."""
        if self._behind > MAX_PENDING:
            return False
        self._waiting.extend(events)
        self._behind += len(events)
        if new is not None:
            self._waiting.append(new)
            self._behind += len(new.token_ids)
        self._some.set()
        return True

    def close(self) -> None:
        """End the stream; what waits is not written."""
        self._closed = True
        self._some.set()

    async def next_batch(self) -> scheduler_pb2.AttachResponse | None:
        """What to write in one message, as soon as there is anything. None: the stream is to end."""
        await self._some.wait()
        if self._closed:
            return None
        batch = scheduler_pb2.AttachResponse()
        size = 0
        while self._waiting and size < MAX_BATCH_BYTES:
            each = self._waiting.popleft()
            if not isinstance(each, Event):  # what is later needs a message of its own
                batch.new_tokens.CopyFrom(each)
                self._behind -= len(each.token_ids)
                break
            batch.events.append(each)
            self._behind -= 1
            size += each.ByteSize()
        if not self._waiting:
            self._some.clear()
        return batch


@dataclass(slots=True)
class Gateway:
    """What is known of one gateway."""

    attachment: Attachment | None = None
    attached_at: float = 0.0
    """Loop time when it last came. 0: it never did."""
    finals: dict[str, Final] = field(default_factory=dict)
    """By request id, oldest first."""
    timer: asyncio.TimerHandle | None = None
    """Runs out when it was away for too long."""


class GatewayHub:
    """All gateways. Lives in the event loop's thread."""

    def __init__(self) -> None:
        self._gateways: dict[str, Gateway] = {}
        self._owners: list[RequestOwner] = []
        self._last_number = 0

    def new_number(self) -> int:
        """A number for a request, which no other request of this process has or had."""
        self._last_number += 1
        return self._last_number

    def add(self, owner: RequestOwner) -> None:
        """Its requests' events go through this hub from now on."""
        self._owners.append(owner)

    def remove(self, owner: RequestOwner) -> None:
        """It has no requests any more."""
        self._owners.remove(owner)

    # From gateways

    def attach(self, name: str) -> Attachment:
        """A gateway's stream is open. An older one of it is ended."""
        gateway = self._gateways.setdefault(name, Gateway())
        if gateway.attachment is not None:
            gateway.attachment.close()
        if gateway.timer is not None:
            gateway.timer.cancel()
            gateway.timer = None
        events = [event for owner in self._owners for event in owner.replay(name)]
        events += [final.event for final in gateway.finals.values()]
        gateway.attachment = Attachment(name, events)
        gateway.attached_at = asyncio.get_running_loop().time()
        log.info("gateway attached", gateway=name, replayed=len(events))
        return gateway.attachment

    def detach(self, attachment: Attachment) -> None:
        """That stream has ended."""
        attachment.close()
        gateway = self._gateways.get(attachment.gateway)
        if gateway is not None and gateway.attachment is attachment:
            log.info("gateway detached", gateway=attachment.gateway)
            gateway.attachment = None
            self._expect(attachment.gateway, gateway)

    def cancel(self, what: scheduler_pb2.AttachRequest.Cancel) -> None:
        """A gateway does not want that request any more."""
        for owner in self._owners:
            if what.number:
                owner.cancel_number(what.number)
            else:
                owner.cancel(what.request_id)

    def resume(self, answer: scheduler_pb2.AttachRequest.Resume) -> None:
        """A gateway says how far a request had come."""
        for owner in self._owners:
            owner.resume(answer)

    # To gateways

    def send(self, name: str, events: Sequence[Event], new: NewTokens | None = None) -> None:
        """Tell a gateway, at once or when it is back, of events and of tokens that are later than these."""
        gateway = self._gateways.setdefault(name, Gateway())
        if gateway.attachment is None:
            self._expect(name, gateway)
        elif not gateway.attachment.put(events, new):
            log.warning("gateway does not keep up; its stream is ended", gateway=name)
            self.detach(gateway.attachment)

    def finished(self, name: str, request_id: str, event: Event, settle: Callable[[], None]) -> None:
        """A request is over and `event` tells all of it; the gateway was sent what it did not know.
        `settle` is called when the gateway has it, or will never."""
        gateway = self._gateways.setdefault(name, Gateway())
        loop = asyncio.get_running_loop()
        if len(gateway.finals) >= MAX_KEPT:
            gateway.finals.pop(next(iter(gateway.finals))).settle()
        gateway.finals[request_id] = Final(event, settle, loop.time())
        loop.call_later(SETTLE, self._settle, name, request_id)

    def _settle(self, name: str, request_id: str) -> None:
        gateway = self._gateways.get(name)
        final = gateway.finals.get(request_id) if gateway else None
        if gateway is None or final is None:
            return
        loop = asyncio.get_running_loop()
        told = loop.time() - max(gateway.attached_at, final.since)
        heard = gateway.attachment is not None and told >= 0.9 * SETTLE
        if heard or loop.time() - final.since >= KEEP:
            del gateway.finals[request_id]
            final.settle()
            self._forget(name, gateway)
        else:
            loop.call_later(SETTLE, self._settle, name, request_id)

    def _expect(self, name: str, gateway: Gateway) -> None:
        if gateway.timer is None:
            grace = GRACE if gateway.attached_at else FIRST_GRACE
            gateway.timer = asyncio.get_running_loop().call_later(grace, self._lost, name)

    def _lost(self, name: str) -> None:
        """Drop its requests. Should it come back after all, it hears how they ended."""
        log.warning("gateway is gone; its requests are cancelled", gateway=name)
        gateway = self._gateways[name]
        gateway.timer = None
        for final in gateway.finals.values():
            final.settle()
            final.settle = _nothing
        for owner in self._owners:
            owner.gateway_lost(name)
        self._forget(name, gateway)

    def _forget(self, name: str, gateway: Gateway) -> None:
        """Drop the books of a gateway that is away and has nothing to hear."""
        if gateway.attachment is None and gateway.timer is None and not gateway.finals:
            self._gateways.pop(name, None)


def _nothing() -> None:
    """What is left to settle when that was done before."""
