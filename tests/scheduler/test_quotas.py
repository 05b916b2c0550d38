"""Quotas move, and nothing is made or lost on the way."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from muxserve.scheduler.policy.interface import ModelSnapshot
from muxserve.scheduler.policy.quotas import HIGH, adapted, floor, initial

names = st.sampled_from(["a", "b", "c", "d"])


@given(
    st.dictionaries(names, st.integers(0, 10_000), min_size=1),
    st.dictionaries(names, st.floats(0, 12_000)),
    st.sets(names),
    st.integers(0, 500),
)
def test_adaptation_keeps_the_sum_and_takes_from_nobody_what_it_needs(
    quotas: dict[str, int], use: dict[str, float], wanting: set[str], least: int
) -> None:
    use = {name: value for name, value in use.items() if name in quotas}
    after = adapted(quotas, use, wanting, least)
    assert sum(after.values()) == sum(quotas.values())
    for name in quotas:
        if after[name] < quotas[name]:
            assert after[name] >= least
            assert after[name] >= int(use[name])
        if after[name] > quotas[name]:
            assert name in wanting and use[name] >= HIGH * quotas[name]
            assert after[name] <= quotas[name] * 1.1 + 1


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 200), st.floats(0, 50), st.sampled_from([0, 0, 100])),
        min_size=1,
        max_size=5,
    ),
    st.integers(1000, 100_000),
    st.floats(0, 1),
)
@example([(2, 1, 5e-324, 0)], 1000, 0.0)
def test_initial_quotas_fit_the_arena_and_keep_the_floor(
    shapes: list[tuple[int, int, float, int]], total: int, min_share: float
) -> None:
    models = [
        ModelSnapshot(f"m{i}", tokens, span, 4, None, pinned_quota=pinned, rate=rate)
        for i, (tokens, span, rate, pinned) in enumerate(shapes)
    ]
    quotas = initial(models, total, min_share)
    assert set(quotas) == {m.model for m in models}
    assert sum(quotas.values()) <= total
    free = [m for m in models if not m.pinned_quota]
    rest = total - sum(m.pinned_quota for m in models)
    for m in models:
        least = m.pinned_quota or floor(len(free), rest, min_share)
        assert quotas[m.model] >= least
