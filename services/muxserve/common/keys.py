"""Every Redis key of MuxServe, each with one builder and one owner: nobody else writes to it.

Words in braces are Redis Cluster hash tags: keys that one script touches share a slot.
"""

from __future__ import annotations

PREFIX = "muxserve"


def services(kind: str) -> str:
    """Set of the ids of processes of `kind` that were announced. Owner: `common.registry`."""
    return f"{PREFIX}:services:{kind}"


def service(kind: str, service_id: str) -> str:
    """String, a serialized `ServiceEntry`, with a time to live. Owner: the process it speaks of."""
    return f"{PREFIX}:service:{kind}:{service_id}"


def placement() -> str:
    """Hash `epoch`, `document` (a serialized `Placement`). Owner: placement."""
    return f"{PREFIX}:placement"


def quotas(unit: str) -> str:
    """Hash `revision` and one `model:<name>` field of blocks per model. Owners, by compare-and-set: the
    unit's scheduler, and placement for an administrator."""
    return f"{PREFIX}:{{unit:{unit}}}:quotas"


def quota_history(unit: str) -> str:
    """Hash of the latest revisions of a unit's quotas: `<revision>`, what was asked for, and
    `<revision>:outcome`, what became of it; both a serialized `QuotaRevision`. Owners: whoever writes the
    quotas, and for outcomes the unit's scheduler."""
    return f"{PREFIX}:{{unit:{unit}}}:quota-history"


def queue(model: str) -> str:
    """Stream of accepted requests of `model`. Owner: `common.queue` (gateways add, schedulers take)."""
    return f"{PREFIX}:queue:{model}"


def unit_lease(unit: str) -> str:
    """String with a time to live: who schedules `unit`. Owner: the scheduler that holds it."""
    return f"{PREFIX}:{{unit:{unit}}}:lease"


def unit_epoch(unit: str) -> str:
    """Counter: the fencing epoch of the newest lease of `unit`. Owner: the scheduler that takes the lease."""
    return f"{PREFIX}:{{unit:{unit}}}:epoch"
