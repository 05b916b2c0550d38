"""Costs: what is measured is believed, what is not is filled in, and nothing else is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from muxserve.placement.solver.cost import CostError, Service, parse_costs
from muxserve.placement.solver.roofline import Costs, Roofline
from muxserve.placement.solver.shapes import SHAPES
from tests.placement.solver.inputs import BATCHES, COSTS, LENGTHS, table_document


def cell(prefill: float, decoding: float) -> dict[str, float]:
    return {"prefill": prefill, "decoding": decoding}


def one(cells: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    return {"m": {"1": {"100": cells}}}


def test_measured_points_are_returned_as_they_are() -> None:
    document = table_document()
    for batch in BATCHES:
        for length in LENGTHS:
            measured = document["llama-7b"]["2"]["60"][str(batch)][str(length)]
            assert COSTS.prefill("llama-7b", 2, 0.6, batch, length) == pytest.approx(
                measured["prefill"] / 1e3
            )
            assert COSTS.decode("llama-7b", 2, 0.6, batch, length) == pytest.approx(
                measured["decoding"] / 1e3
            )


def test_between_points_times_are_interpolated_linearly() -> None:
    costs = parse_costs(
        one(
            {
                "1": {"10": cell(10, 1), "30": cell(30, 3)},
                "3": {"10": cell(30, 3), "30": cell(90, 9)},
            }
        )
    )
    assert costs.decode("m", 1, 1.0, 2, 20) == pytest.approx(0.004)
    assert costs.prefill("m", 1, 1.0, 2, 10) == pytest.approx(0.020)


def test_beyond_the_table_times_go_on_growing() -> None:
    big = COSTS.decode("llama-13b", 1, 1.0, 512, 256)
    assert big > COSTS.decode("llama-13b", 1, 1.0, 256, 256)
    assert COSTS.decode("llama-13b", 1, 1.0, 8, 2048) > COSTS.decode("llama-13b", 1, 1.0, 8, 512)
    assert COSTS.decode("llama-13b", 1, 0.15, 8, 128) == pytest.approx(
        2 * COSTS.decode("llama-13b", 1, 0.3, 8, 128)
    )


def test_a_share_between_two_that_were_measured_lies_between_them() -> None:
    low, middle, high = (COSTS.prefill("llama-7b", 1, share, 4, 128) for share in (0.3, 0.45, 0.6))
    assert high < middle < low


def test_cells_that_were_not_measured_are_filled_from_their_neighbours() -> None:
    document = one(
        {
            "1": {"10": cell(10, 1)},
            "2": {"10": cell(20, 2)},
            "4": {"10": cell(-1, -1)},
            "8": {"10": cell(-1.0, -1)},
        }
    )
    costs = parse_costs(document)
    assert costs.prefill("m", 1, 1.0, 8, 10) == pytest.approx(0.080)
    assert costs.decode("m", 1, 1.0, 3, 10) == pytest.approx(0.003)


def test_a_time_far_above_that_of_more_work_is_not_believed() -> None:
    document = one(
        {
            "1": {"10": cell(10, 10)},
            "2": {"10": cell(20, 110)},
            "4": {"10": cell(40, 12)},
        }
    )
    assert parse_costs(document).decode("m", 1, 1.0, 2, 10) < 0.013


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"m": 1},
        {"m": {"one": {}}},
        {"m": {"1": {"100": {"1": {"10": 3}}}}},
        {"m": {"1": {"100": {"1": {"10": {"prefill": "fast"}}}}}},
        {"m": {"1": {"100": {"1": {"10": {"prefill": -1, "decoding": -1}}}}}},
    ],
)
def test_what_is_no_table_is_refused(document: Any) -> None:
    with pytest.raises(CostError):
        parse_costs(document)


def test_a_model_without_a_table_is_predicted_from_its_shape() -> None:
    shape = SHAPES["qwen3-8b"]
    costs = Costs(COSTS, frozenset(COSTS.models), Roofline({"qwen3-8b": shape}))
    assert costs.degrees("qwen3-8b", shape) == [1, 2, 4, 8]
    seven = costs.decode("llama-7b", 1, 1.0, 16, 128)
    assert 0.5 * seven < costs.decode("qwen3-8b", 1, 1.0, 16, 128) < 2 * seven


def test_heads_that_do_not_divide_rule_a_degree_out() -> None:
    assert list(Roofline(SHAPES).degrees("llama-30b", SHAPES["llama-30b"])) == [1, 2, 4]


def test_shapes_have_the_sizes_that_their_names_promise() -> None:
    sizes = {"llama-7b": 6.7e9, "llama-13b": 13.0e9, "llama-30b": 32.5e9, "llama-65b": 65.2e9}
    for name, size in sizes.items():
        assert SHAPES[name].parameters == pytest.approx(size, rel=0.01)
    assert SHAPES["llama-7b"].kv_bytes == 512 * 1024


def test_a_table_may_say_what_the_service_adds() -> None:
    cells = {"1": {"100": {"1": {"16": {"prefill": 10, "decoding": 5}}}}}
    assert parse_costs({"m": cells}).service == Service()
    said = {
        "request_seconds": 0.01,
        "compute_units": 2,
        "slots": 64,
        "decode_lanes": 2,
        "order_seconds": 0.002,
        "lease_seconds": 0.001,
    }
    costs = parse_costs({"$service": said, "m": cells})
    assert costs.service == Service(0.01, 2, 64, 2, 0.002, 0.001)
    assert costs.models == ["m"]
    for wrong in ({"speed": 1}, {"slots": -1}, {"slots": "many"}, {"slots": True}, 3):
        with pytest.raises(CostError, match=r"\$service"):
            parse_costs({"$service": wrong, "m": cells})
