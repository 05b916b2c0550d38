"""Our decoder prints what transformers prints: float32, greedy, token for token.

Prompts of mixed lengths are prefilled together in chunks with history, then decoded together, over blocks
scattered in an arena full of NaN; transformers takes each prompt alone and whole.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from muxserve.engine.checkpoint import open_checkpoint
from tests.engine.greedy import load_decoder, load_reference, make_cache, our_greedy, ragged, their_greedy
from tests.engine.model_factory import FAMILIES, Family, make_model

NEW, CHUNK = 16, 24
LENGTHS = (1, 7, 24, 25, 61, 100)
"""Shorter than a chunk, one chunk, one more, and longer than two."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random_prompts(vocab: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    chooser = random.Random(1)
    return [[chooser.randrange(3, vocab) for _ in range(length)] for length in lengths]


def assert_parity(path: Path, block_bytes: int = 4096) -> None:
    checkpoint = open_checkpoint(path, "float32")
    prompts = random_prompts(checkpoint.spec.vocab_size)
    ours = our_greedy(checkpoint, prompts, NEW, chunk=CHUNK, block_bytes=block_bytes)
    theirs = their_greedy(load_reference(path), prompts, NEW)
    assert ours == theirs
    assert len({token for text in ours for token in text}) > 10  # a stuck model would agree with anything


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"),
    [(64, 4, 2, None), (80, 4, 4, 16), (128, 6, 2, 9), (256, 2, 1, 40)],
)
def test_families(
    tmp_path: Path, family: Family, head_dim: int, heads: int, kv_heads: int, window: int | None
) -> None:
    make_model(family, tmp_path, head_dim=head_dim, heads=heads, kv_heads=kv_heads, window=window)
    # 5056 bytes: a block with a tail that holds no token.
    assert_parity(tmp_path, block_bytes=5056 if head_dim == 80 else 4096)


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "gemma3_text"])
def test_biases(tmp_path: Path, family: Family) -> None:
    assert_parity(make_model(family, tmp_path, bias=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("tie", [True, False])
def test_tied_and_untied_embeddings(tmp_path: Path, family: Family, tie: bool) -> None:
    assert_parity(make_model(family, tmp_path, tie=tie))


def test_final_soft_cap_and_query_scale(tmp_path: Path) -> None:
    overrides = {"final_logit_softcapping": 1.0, "query_pre_attn_scalar": 100, "attn_logit_softcapping": 0.5}
    path = make_model("gemma3_text", tmp_path, overrides=overrides)
    assert_parity(path)
    # The cap keeps the order of tokens, so text alone does not show it.
    checkpoint = open_checkpoint(path, "float32")
    (prompt,) = random_prompts(checkpoint.spec.vocab_size, (40,))
    decoder, cache = load_decoder(checkpoint), make_cache(checkpoint, 1, 40, 4096)
    ours = decoder.logits(decoder.forward(torch.tensor(prompt), ragged([0], [0], [40]), cache))
    with torch.inference_mode():
        theirs = load_reference(path)(torch.tensor([prompt])).logits[0]
    assert 0.9 < theirs.abs().max() < 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0 + 0.1 * i for i in range(32)],
    "long_factor": [2.0 + 0.2 * i for i in range(32)],
    "original_max_position_embeddings": 256,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    LLAMA3,
    YARN,
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    LONGROPE,
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rope_scaling(tmp_path: Path, family: Family, scaling: dict[str, Any]) -> None:
    assert_parity(make_model(family, tmp_path, rope_scaling=scaling))


def test_gemma_scales_only_its_full_layers(tmp_path: Path) -> None:
    path = make_model("gemma3_text", tmp_path, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert_parity(path)
