"""Workloads: read as they are, and refused by the field that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from muxserve.placement.solver.workload import WorkloadError, parse_workload, read_workload

GOOD: dict[str, Any] = {
    "cluster": {"nnodes": 4, "ngpus_per_node": 8},
    "models": [
        {"name": "a", "model": "llama-13b", "rate": 19.5},
        {"name": "b", "model": "llama-7b", "rate": 0},
    ],
    "avg_output_len": 261.3,
    "avg_prompt_len": 100.2,
}


def test_the_papers_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    workload = read_workload(path)
    assert workload.gpus == 32
    assert workload.rate == 19.5
    assert workload.models[0].output_tokens == 261.3


def test_nodes_may_differ_and_models_may_have_lengths_and_shapes_of_their_own() -> None:
    shape = {
        "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 128,
        "vocabulary": 100, "tied": True,
    }  # fmt: skip
    workload = parse_workload(
        GOOD
        | {
            "cluster": {"nodes": [{"gpus": 8}, {"gpus": 2, "memory_gib": 40}]},
            "models": [{"name": "x", "model": "ours", "rate": 1, "avg_output_len": 7, "shape": shape}],
        }
    )
    assert [node.gpus for node in workload.nodes] == [8, 2]
    assert workload.nodes[1].memory_bytes * 2 == workload.nodes[0].memory_bytes
    assert workload.models[0].output_tokens == 7
    assert workload.models[0].shape.tied


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"models": []}, "models"),
        ({"models": [{"name": "a", "model": "llama-7b"}]}, "models[0].rate"),
        ({"models": [{"name": "a", "model": "llama-7b", "rate": -1}]}, "models[0].rate"),
        ({"models": [{"name": "a", "model": "llama-7b", "rate": float("nan")}]}, "models[0].rate"),
        ({"models": [{"name": "a", "model": "gpt", "rate": 1}]}, "models[0].model"),
        ({"models": [{"name": "a", "model": "llama-7b", "rate": 1, "rates": 2}]}, "models[0]"),
        ({"models": [GOOD["models"][0], GOOD["models"][0]]}, "models[1].name"),
        ({"cluster": {"nnodes": 0, "ngpus_per_node": 8}}, "cluster.nnodes"),
        ({"cluster": {"nnodes": 1}}, "cluster.ngpus_per_node"),
        ({"cluster": {"nodes": [{"gpus": 8, "memory_gib": -3}]}}, "cluster.nodes[0].memory_gib"),
        ({"cluster": 3}, "cluster"),
        ({"avg_output_len": "long"}, "avg_output_len"),
        ({"avg_output_length": 3}, "workload"),
        ({"constraints": {"pin": {"z": 1}}}, "constraints.pin"),
        ({"constraints": {"pin": {"a": 9}}}, "constraints.pin.a"),
        ({"constraints": {"apart": [["a"]]}}, "constraints.apart[0]"),
        ({"constraints": {"spare_gpus": -1}}, "constraints.spare_gpus"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(WorkloadError, match="^" + field.replace("[", r"\[").replace("]", r"\]")):
        parse_workload(GOOD | change)


def test_lengths_must_come_from_somewhere() -> None:
    with pytest.raises(WorkloadError, match="avg_prompt_len"):
        parse_workload({key: value for key, value in GOOD.items() if key != "avg_prompt_len"})


def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("models: [")
    with pytest.raises(WorkloadError, match="not YAML"):
        read_workload(path)
