"""Workloads and costs for tests: small, made up, and quick to compute with."""

from __future__ import annotations

import random
from typing import Any

from muxserve.placement.solver.cost import TableCosts, parse_costs
from muxserve.placement.solver.roofline import Roofline
from muxserve.placement.solver.shapes import SHAPES
from muxserve.placement.solver.workload import Workload, parse_workload

KINDS = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")
BATCHES, LENGTHS = (1, 4, 16, 64, 256), (32, 128, 512)


def table_document() -> dict[str, Any]:
    """A cost table as JSON holds it, with the roofline's times."""
    roofline = Roofline(SHAPES)
    return {
        kind: {
            str(degree): {
                str(percent): {
                    str(batch): {
                        str(length): {
                            "prefill": 1e3 * roofline.prefill(kind, degree, percent / 100, batch, length),
                            "decoding": 1e3 * roofline.decode(kind, degree, percent / 100, batch, length),
                        }
                        for length in LENGTHS
                    }
                    for batch in BATCHES
                }
                for percent in (30, 60, 100)
            }
            for degree in roofline.degrees(kind, SHAPES[kind])
        }
        for kind in KINDS
    }


COSTS: TableCosts = parse_costs(table_document())


def workload(rates: dict[str, tuple[str, float]], nodes: int = 1, gpus: int = 4, **further: Any) -> Workload:
    """`rates`: name to (checkpoint, requests per second)."""
    return parse_workload(
        {
            "cluster": {"nnodes": nodes, "ngpus_per_node": gpus},
            "models": [{"name": n, "model": kind, "rate": rate} for n, (kind, rate) in rates.items()],
            "avg_prompt_len": 100,
            "avg_output_len": 200,
            **further,
        }
    )


def random_workload(source: random.Random, models: int, gpus: int) -> Workload:
    """Models of random kinds and popularity on one node."""
    return workload(
        {f"m{i}": (source.choice(KINDS[:3]), round(source.uniform(0.2, 12), 2)) for i in range(models)},
        gpus=gpus,
    )
