"""The queues: one Redis stream per model, read by schedulers through one consumer group.

An entry lives from admission until the request is over, so that a dead scheduler's requests are found in the
group's pending list. Its delivery count is the request's attempt. A request waits while it is in the stream
and was delivered to nobody, or was handed back: then it is pending for a consumer that nobody is, RELEASED,
so that whoever serves its model claims it before new ones are pulled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from muxserve.common import keys
from muxserve.common.errors import Overloaded
from muxserve.common.store import RETRY_AFTER, redis_errors
from muxserve.v1 import scheduler_pb2

GROUP = "schedulers"
RELEASED = "released"
"""Consumer of requests that were handed back. No unit bears this name."""
FIELD = b"r"
CLAIM_LIMIT = 1000
"""Most pending entries of a model that one claim looks at."""

# Both scripts start by making sure that the group exists; it begins at 0, before the first entry ever.
_PENDING = """
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1] %s)
if pending.err then
  redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
  pending = redis.call('XPENDING', KEYS[1], ARGV[1] %s)
end
"""
_ADMIT = (
    _PENDING % ("", "")
    + """
local waiting = redis.call('XLEN', KEYS[1]) - pending[1]
for _, consumer in ipairs(pending[4] or {}) do
  if consumer[1] == ARGV[5] then waiting = waiting + consumer[2] end
end
if waiting >= tonumber(ARGV[2]) then return false end
return redis.call('XADD', KEYS[1], '*', ARGV[3], ARGV[4])
"""
)
_RANGE = f", '-', '+', {CLAIM_LIMIT}"
_CLAIM = (
    _PENDING % (_RANGE, _RANGE)
    + """
local alive, held, live = {}, {}, tonumber(ARGV[3])
for i = 4, 3 + live do alive[ARGV[i]] = true end
for i = 4 + live, #ARGV do held[ARGV[i]] = true end
local claimed = {}
for _, entry in ipairs(pending) do
  local id, owner, count = entry[1], entry[2], entry[4]
  local lost = not alive[owner]
  if owner == ARGV[2] then lost = not held[id] end
  if lost then
    local got = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id)
    if got[1] then table.insert(claimed, {id, got[1][2][2], count + 1}) end
  end
end
return claimed
"""
)
# Delivery counts stay as they are (JUSTID): handing back is no attempt.
_RELEASE = f"""
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', {CLAIM_LIMIT}, ARGV[2])
if pending.err then return 0 end
local kept, released = {{}}, 0
for i = 4, #ARGV do kept[ARGV[i]] = true end
for _, entry in ipairs(pending) do
  if not kept[entry[1]] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, entry[1], 'JUSTID')
    released = released + 1
  end
end
return released
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A request handed to this consumer."""

    entry_id: str
    model: str
    request: scheduler_pb2.QueuedRequest
    attempt: int
    """How often the entry was delivered: 1 the first time, more after a claim."""


class RequestQueue:
    """The queues of all models. Every method raises Unavailable while Redis is away."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        self._admit = redis.register_script(_ADMIT)
        self._claim = redis.register_script(_CLAIM)
        self._release = redis.register_script(_RELEASE)

    async def admit(self, request: scheduler_pb2.QueuedRequest, max_waiting: int) -> str:
        """Append `request` to its model's queue; returns its entry id.

        Raises Overloaded if `max_waiting` requests wait already. After Unavailable the entry may or may not
        be there: a scheduler that pulls it gets the gateway's cancel for a request unknown to it.
        """
        with redis_errors("queueing a request"):
            entry = await self._admit(
                keys=[keys.queue(request.model)],
                args=[GROUP, max_waiting, FIELD, request.SerializeToString(), RELEASED],
            )
        if entry is None:
            raise Overloaded(
                f'the queue of model "{request.model}" is full ({max_waiting} wait)', RETRY_AFTER
            )
        return bytes(entry).decode()

    async def withdraw(self, model: str, entry_id: str) -> None:
        """Remove an entry whose request nobody wants any more, delivered or not."""
        await self.acknowledge(model, [entry_id])

    async def acknowledge(self, model: str, entry_ids: Iterable[str]) -> None:
        """Remove entries whose requests are over. Idempotent."""
        ids = list(entry_ids)
        if not ids:
            return
        with redis_errors("acknowledging requests"):
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xack(keys.queue(model), GROUP, *ids)
                pipe.xdel(keys.queue(model), *ids)
                await pipe.execute()

    async def pull(self, want: Mapping[str, int], consumer: str, block_ms: int) -> list[Delivery]:
        """Take new entries for `consumer`: at most want[model] of each model, oldest first.

        Waits up to `block_ms` (0: not at all; keep it below the client's socket timeout) if there are none.
        When models want different numbers, a call may return fewer than there are: the next gets the rest.
        """
        streams = {keys.queue(model): model for model, count in want.items() if count > 0}
        if not streams:
            return []
        with redis_errors("pulling requests"):
            try:
                answer = await self._read(streams, min(want[m] for m in streams.values()), consumer, block_ms)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                await self._create_groups(streams)
                answer = await self._read(streams, min(want[m] for m in streams.values()), consumer, block_ms)
        deliveries = []
        for name, entries in answer or []:
            for entry_id, fields in entries:
                payload = fields.get(FIELD, b"")
                deliveries += await self._parse(streams[name.decode()], entry_id, payload, attempt=1)
        return deliveries

    async def claim(
        self,
        models: Iterable[str],
        consumer: str,
        live_consumers: Collection[str],
        known: Collection[str] = (),
    ) -> list[Delivery]:
        """Take over pending entries: those of consumers not in `live_consumers`, and those of `consumer`
        itself that are not in `known` (lost by a restart, or with an answer of Redis that never arrived)."""
        deliveries = []
        arguments: list[str | int] = [GROUP, consumer, len(live_consumers), *live_consumers, *known]
        for model in models:
            with redis_errors("claiming requests"):
                claimed = await self._claim(keys=[keys.queue(model)], args=arguments)
            for entry_id, payload, attempt in claimed:
                deliveries += await self._parse(model, entry_id, payload, attempt)
        return deliveries

    async def release(self, model: str, consumer: str, kept: Collection[str] = ()) -> int:
        """Hand back the entries that `consumer` has, but for those in `kept`, for others to claim at once;
        how many there were."""
        with redis_errors("handing requests back"):
            arguments = [GROUP, consumer, RELEASED, *kept]
            return int(await self._release(keys=[keys.queue(model)], args=arguments))

    async def depth(self, model: str) -> int:
        """Requests of `model` that wait: admitted and delivered to no scheduler, or handed back."""
        key = keys.queue(model)
        with redis_errors("reading a queue's length"):
            length = int(await self._redis.xlen(key))
            try:
                pending = await self._redis.xpending(key, GROUP)
            except ResponseError:  # no group: nothing was ever delivered
                return length
        released = [each["pending"] for each in pending["consumers"] if each["name"] == RELEASED.encode()]
        return length - int(pending["pending"]) + sum(map(int, released))

    async def _read(self, streams: Iterable[str], count: int, consumer: str, block_ms: int) -> Any:
        wanted = dict.fromkeys(streams, ">")
        return await self._redis.xreadgroup(GROUP, consumer, wanted, count=count, block=block_ms or None)

    async def _create_groups(self, streams: Iterable[str]) -> None:
        for stream in streams:
            try:
                await self._redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def _parse(self, model: str, entry_id: bytes, payload: bytes, attempt: int) -> list[Delivery]:
        """The delivery; empty if the payload is no request (the entry is removed: nobody could serve it)."""
        try:
            request = scheduler_pb2.QueuedRequest.FromString(payload)
        except DecodeError:
            request = scheduler_pb2.QueuedRequest()
        if not request.request_id:
            await self.acknowledge(model, [entry_id.decode()])
            return []
        return [Delivery(entry_id.decode(), model, request, attempt)]
