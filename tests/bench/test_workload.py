"""Workloads: what is drawn is what was asked for, and the same seed draws it again."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxserve.bench.workload import (
    Lengths,
    Mix,
    Request,
    Stream,
    TraceError,
    merge,
    popularity,
    read_trace,
    shifted,
    trace_line,
)

MODELS = ("a", "b", "c", "d")


def mix(alpha: float = 1.3, **more: object) -> Mix:
    streams = tuple(Stream(name, share, Lengths()) for name, share in popularity(MODELS, alpha).items())
    return Mix(streams, **more)  # type: ignore[arg-type]


def test_popularity_is_a_power_law() -> None:
    shares = popularity(MODELS, 2.0)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["a"] / shares["b"] == pytest.approx(4)
    assert shares["a"] / shares["d"] == pytest.approx(16)
    assert set(popularity(MODELS, 0).values()) == {0.25}


def test_arrivals_are_poisson_of_the_asked_rate_and_popularity() -> None:
    requests = mix().poisson(50, 200, seed=1)
    assert len(requests) == pytest.approx(10_000, rel=0.05)
    assert [request.at for request in requests] == sorted(request.at for request in requests)
    counts = Counter(request.model for request in requests)
    for model, share in popularity(MODELS, 1.3).items():
        assert counts[model] / len(requests) == pytest.approx(share, rel=0.1)
    gaps = [later.at - earlier.at for earlier, later in pairwise(requests)]
    spread = mean(gap * gap for gap in gaps) / mean(gaps) ** 2
    assert spread == pytest.approx(2, rel=0.1), "exponential gaps have twice their squared mean"


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    assert mix().poisson(5, 20, seed=3) == mix().poisson(5, 20, seed=3)
    assert mix().poisson(5, 20, seed=3) != mix().poisson(5, 20, seed=4)


def test_another_rate_moves_the_same_requests_together() -> None:
    slow, fast = mix().poisson(5, 40, seed=3), mix().poisson(10, 20, seed=3)
    for model in MODELS:
        of_slow = [request for request in slow if request.model == model]
        of_fast = [request for request in fast if request.model == model]
        assert [request.prompt for request in of_slow] == [request.prompt for request in of_fast]
        assert [request.at / 2 for request in of_slow] == pytest.approx([request.at for request in of_fast])


def test_lengths_have_sharegpts_means_and_scale() -> None:
    wide = Lengths(context=10**6)
    requests = Mix((Stream("a", 1, wide),)).poisson(100, 100, seed=0)
    assert mean(request.prompt_tokens for request in requests) == pytest.approx(161, rel=0.1)
    assert mean(request.output_tokens for request in requests) == pytest.approx(338, rel=0.1)
    small = wide.scaled(0.1, 0.5)
    assert (small.prompt, small.output) == pytest.approx((16.1, 169))


@given(context=st.integers(16, 4096), scale=st.floats(0.01, 20), seed=st.integers(0, 10**6))
def test_prompt_and_output_always_fit_the_context(context: int, scale: float, seed: int) -> None:
    lengths = Lengths(context=context).scaled(scale)
    for request in Mix((Stream("a", 1, lengths),)).poisson(10, 3, seed):
        assert request.prompt_tokens >= 1 and request.output_tokens >= 1
        assert request.prompt_tokens + request.output_tokens <= context


def test_tenants_get_their_parts() -> None:
    requests = mix(tenants={"small": 1, "large": 10}).poisson(50, 100, seed=2)
    counts = Counter(request.tenant for request in requests)
    assert counts["large"] / counts["small"] == pytest.approx(10, rel=0.2)


def test_token_ids_stay_below_the_vocabulary_and_above_special_tokens() -> None:
    for request in mix(vocabulary=64).poisson(5, 5, seed=0):
        assert all(32 <= token < 64 for token in request.prompt if isinstance(token, int))


def test_text_prompts_are_text() -> None:
    assert all(isinstance(request.prompt, str) for request in mix(text=True).poisson(5, 5, seed=0))


def test_workloads_merge_in_order_of_arrival() -> None:
    early, late = mix().poisson(2, 5, seed=0), shifted(mix().poisson(2, 5, seed=1), 2.5)
    both = merge(late, early)
    assert len(both) == len(early) + len(late)
    assert [request.at for request in both] == sorted(request.at for request in both)
    assert min(request.at for request in late) >= 2.5


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    requests = [
        Request(0.25, "a", (5, 6, 7), 9, "gold", 3),
        Request(1.5, "b", "how are you?", 4),
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(trace_line(request) + "\n" for request in requests))
    assert read_trace(trace, mix()) == requests
    assert [request.at for request in read_trace(trace, mix(), time_scale=2)] == [0.5, 3.0]


def test_a_trace_may_give_lengths_alone(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"time": 0, "model": "a", "prompt_tokens": 12, "output_tokens": 3}) + "\n\n")
    (request,) = read_trace(trace, mix())
    assert (request.prompt_tokens, request.output_tokens) == (12, 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting"),
        ("[]", "not an object"),
        ('{"time": 0, "model": "a", "output_tokens": 3}', "exactly one of prompt"),
        ('{"time": 0, "output_tokens": 3, "prompt": "x"}', "model is missing"),
        ('{"time": -1, "model": "a", "output_tokens": 3, "prompt": "x"}', "time must be 0 or more"),
        ('{"time": 0, "model": "a", "output_tokens": 0, "prompt": "x"}', "output_tokens must be 1 or more"),
        ('{"time": 0, "model": "a", "output_tokens": 1, "prompt": ""}', "the prompt is empty"),
        ('{"time": 0, "model": "a", "output_tokens": 1, "prompt": "x", "sice": 1}', "unknown field sice"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str, said: str) -> None:
    trace = tmp_path / "trace.jsonl"
    good = trace_line(Request(0, "a", "x", 1))
    trace.write_text(f"{good}\n{line}\n")
    with pytest.raises(TraceError, match=rf"line 2: .*{said}"):
        read_trace(trace, mix())
