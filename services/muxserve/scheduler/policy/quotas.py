"""Block quotas: where they start, and how they follow use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from muxserve.scheduler.policy.interface import ModelSnapshot

HIGH = 0.9
"""A model that uses this part of its quota, and has requests waiting, gains."""
GAIN = 0.1
"""By this part of its quota at most."""
MARGIN = 1.1
"""A model keeps this multiple of what it used."""


def floor(models: int, total: int, min_share: float) -> int:
    """Least quota of each of `models` models, in blocks."""
    return int(total * min_share / max(1, models))


def initial(models: Sequence[ModelSnapshot], total: int, min_share: float) -> dict[str, int]:
    """Quotas proportional to rate × blocks per token (equal rates where none is known), with a floor; pinned
    ones as they are. They never add up to more than `total` unless the pinned ones do."""
    pinned = {m.model: m.pinned_quota for m in models if m.pinned_quota}
    others = [m for m in models if not m.pinned_quota]
    rest = max(0, total - sum(pinned.values()))
    popularity = _popularity(others)
    weight = {m.model: popularity[m.model] * m.blocks_per_span / m.tokens_per_block for m in others}
    least = floor(len(others), rest, min_share)
    spread = rest - least * len(others)
    shared = {name: least + int(spread * w / sum(weight.values())) for name, w in weight.items()}
    return {m.model: pinned.get(m.model, shared.get(m.model, 0)) for m in models}


def in_force(models: Sequence[ModelSnapshot], total: int, min_share: float) -> tuple[dict[str, int], bool]:
    """The quotas of a unit, and whether these are new: some model had none, or more than there is."""
    current = {m.model: m.quota for m in models if m.quota is not None}
    if len(current) < len(models) or any(quota > total for quota in current.values()):
        return initial(models, total, min_share), True
    return current, False


def compute_parts(models: Sequence[ModelSnapshot], min_share: float) -> dict[str, float]:
    """Parts of the device's time, which add up to 1, proportional to rate (equal where none is known), with
    the same floor as quotas have."""
    weight = _popularity(models)
    least = min_share / max(1, len(models))
    return {
        name: least + (1 - least * len(models)) * each / sum(weight.values()) for name, each in weight.items()
    }


def _popularity(models: Sequence[ModelSnapshot]) -> dict[str, float]:
    """Rates in multiples of their mean, however small they are; 1 where none is known."""
    known = [m.rate for m in models if m.rate > 0]
    usual = sum(known) / len(known) if known else 1.0
    return {m.model: m.rate / usual if m.rate > 0 else 1.0 for m in models}


def adapted(
    quotas: Mapping[str, int], use: Mapping[str, float], wanting: Collection[str], least: int
) -> dict[str, int]:
    """Quotas after blocks moved from models that leave theirs unused to those that are short.

    `use`: blocks held, averaged over time. `wanting`: models with requests that wait. Models absent from
    `use` are left as they are. The sum does not change; nobody falls below `least`, or below its use with a
    margin.
    """
    gains = {
        name: int(quotas[name] * GAIN) or 1
        for name in use
        if name in wanting and use[name] >= HIGH * quotas[name]
    }
    spare = {
        name: max(0, quotas[name] - max(least, int(use[name] * MARGIN))) for name in use if name not in gains
    }
    moved = min(sum(gains.values()), sum(spare.values()))
    if moved == 0:
        return dict(quotas)
    result = dict(quotas)
    for name, part in _split(moved, gains).items():
        result[name] += part
    for name, part in _split(moved, spare).items():
        result[name] -= part
    return result


def _split(amount: int, weights: Mapping[str, int]) -> dict[str, int]:
    """`amount` (at most the weights' sum) in whole numbers proportional to weights, none above its weight."""
    total = sum(weights.values())
    parts = {name: amount * weight // total for name, weight in weights.items()}
    left = amount - sum(parts.values())
    for name, weight in weights.items():
        extra = min(left, weight - parts[name])
        parts[name] += extra
        left -= extra
    return parts
