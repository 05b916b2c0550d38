"""Whether an arena is large enough for a model, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from muxserve.common.errors import InvalidArgument
from muxserve.engine.checkpoint import open_checkpoint
from muxserve.worker.shapes import ServedShape, Weights, serve


def served(path: Path, *, blocks: int, block_bytes: int = 4096, max_context: int = 0) -> ServedShape:
    checkpoint = open_checkpoint(path)
    weights = Weights(checkpoint.spec, "canonical", checkpoint.manifest(), checkpoint.weight_bytes(), ())
    return serve("small", weights, block_bytes=block_bytes, blocks=blocks, slots=4, max_context=max_context)


@pytest.mark.parametrize(
    ("blocks", "max_context", "context"),
    [(10_000, 0, 512), (10_000, 100, 100), (10_000, 1000, 512), (100, 0, 128), (12, 0, 16), (6, 8, 8)],
)
def test_the_context_is_clamped_to_what_was_asked_for_and_what_fits(
    llama: Path, blocks: int, max_context: int, context: int
) -> None:
    assert served(llama, blocks=blocks, max_context=max_context).context_length == context


def test_an_arena_too_small_for_a_model_is_named_with_the_numbers(llama: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        served(llama, blocks=11)
    assert caught.value.field == "arena"
    assert '8 tokens of model "small", not 16' in str(caught.value)


def test_a_block_too_small_for_a_token_is_named(llama: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        served(llama, blocks=1000, block_bytes=448)
    assert caught.value.field == "block_bytes"
    assert "512 bytes" in str(caught.value)
