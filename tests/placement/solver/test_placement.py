"""Placements: what fits is accepted, and what does not is told in full."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from muxserve.placement.solver.placement import InvalidPlacement, Placed, Placement, Unit, parse_placement
from tests.placement.solver.inputs import COSTS, workload

WORK = workload({"a": ("llama-7b", 2), "b": ("llama-13b", 1), "c": ("llama-30b", 1)}, nodes=2)


def unit(gpus: list[tuple[int, int]], *names: str) -> Unit:
    models = WORK.by_name()
    return Unit(tuple(gpus), tuple(Placed(n, models[n].model, len(gpus)) for n in names))


GOOD = Placement((unit([(0, 0)], "a", "b"), unit([(1, 2), (1, 3)], "c", "a")))


def problems(placement: Placement) -> str:
    with pytest.raises(InvalidPlacement) as caught:
        placement.verify(WORK, COSTS)
    return "\n".join(caught.value.problems)


def test_one_that_fits_is_accepted_and_survives_json() -> None:
    GOOD.verify(WORK, COSTS)
    assert parse_placement(json.dumps(GOOD.as_object())) == GOOD
    assert GOOD.gpus == 3


@pytest.mark.parametrize(
    ("units", "why"),
    [
        ([unit([(2, 0)], "a")], "no GPU 0 on node 2"),
        ([unit([(0, 4)], "a")], "no GPU 4 on node 0"),
        ([unit([(0, 0)], "a"), unit([(0, 0)], "b")], "GPU 0 of node 0 is in 2 units"),
        ([unit([(0, 0), (1, 0)], "a")], "several nodes"),
        ([unit([(0, 0), (0, 1), (0, 2)], "a")], "1, 2, 4 or 8 GPUs"),
        ([unit([(0, 0)], "a", "a")], "a is there twice"),
        ([unit([(0, 0)], "c", "b")], "GiB more than its memory"),
        ([Unit(((0, 0),), (Placed("a", "llama-7b", 2),))], "tensor parallel 2 on 1 GPUs"),
        ([Unit(((0, 0),), (Placed("z", "llama-7b", 1),))], "no model z"),
        ([Unit(((0, 0),), (Placed("a", "llama-13b", 1),))], "a is a llama-7b"),
        ([Unit(((0, 0),), (Placed("a", "llama-7b", 1, 0.0, 1.0),))], "prefill share"),
    ],
)
def test_one_that_does_not_is_refused_with_the_reason(units: list[Unit], why: str) -> None:
    assert why in problems(Placement(tuple(units)))


def test_all_problems_are_told_at_once() -> None:
    found = problems(Placement((unit([(9, 0)], "a"), unit([(0, 0)], "b", "b"))))
    assert "node 9" in found
    assert "unit 1: b is there twice" in found


def test_constraints_are_verified() -> None:
    bound = workload(
        {"a": ("llama-7b", 2), "b": ("llama-13b", 1), "c": ("llama-30b", 1)},
        nodes=2,
        constraints={"pin": {"c": 0}, "apart": [["a", "b"]], "spare_gpus": 6},
    )
    with pytest.raises(InvalidPlacement) as caught:
        GOOD.verify(bound, COSTS)
    text = str(caught.value)
    assert "c is pinned to node 0" in text
    assert "a and b must be apart" in text
    assert "5 GPUs are left unused, not 6" in text


def test_smaller_memory_makes_a_model_too_large() -> None:
    small = replace(WORK, nodes=tuple(replace(node, memory_bytes=20 * 2**30) for node in WORK.nodes))
    with pytest.raises(InvalidPlacement, match="memory"):
        GOOD.verify(small, COSTS)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"units": [{"gpus": [[0]], "models": []}]}', '{"units": 3}']
)
def test_what_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(InvalidPlacement):
        parse_placement(text)
