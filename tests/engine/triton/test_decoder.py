"""The decoder on Triton's kernels prints what it prints on the reference's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from muxserve.engine.checkpoint import Checkpoint, fill, open_checkpoint
from muxserve.engine.kernels.interface import Kernels, KVCache
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.kernels.triton.kernels import TritonKernels
from muxserve.engine.kernels.triton.scratch import Scratch
from muxserve.engine.models.decoder import Decoder
from muxserve.engine.weights import map_tensors, weights_memfd
from tests.engine.greedy import make_cache
from tests.engine.model_factory import Family, make_model
from tests.engine.triton.attention import moved, ragged

PROMPTS, CHUNK, STEPS = (1, 13, 40), 24, 3


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    fd = weights_memfd(checkpoint.weight_bytes())
    try:
        fill(checkpoint, fd, threads=1)
        return map_tensors(fd, checkpoint.manifest())
    finally:
        os.close(fd)


def logits_of(checkpoint: Checkpoint, weights: dict[str, Tensor], kernels: Kernels, cache: KVCache) -> Tensor:
    """Logits of every step of greedy decoding, `[STEPS, prompts, vocab]`, prompts prefilled in chunks."""
    decoder = Decoder(checkpoint.spec, weights, kernels)
    device = cache.table.device
    chooser = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, checkpoint.spec.vocab_size, (n,), generator=chooser).tolist() for n in PROMPTS]
    for begin in range(0, max(PROMPTS) - 1, CHUNK):
        ends = [min(begin + CHUNK, len(text) - 1) for text in texts]
        pieces = [(slot, begin, end) for slot, end in enumerate(ends) if begin < end]
        tokens = torch.tensor([t for slot, first, end in pieces for t in texts[slot][first:end]])
        decoder.forward(tokens.to(device), ragged(pieces, device), cache)
    found = []
    for _ in range(STEPS):
        batch = ragged([(slot, len(text) - 1, len(text)) for slot, text in enumerate(texts)], device)
        hidden = decoder.forward(torch.tensor([text[-1] for text in texts]).to(device), batch, cache)
        found.append(decoder.logits(hidden).cpu())
        for text, token in zip(texts, found[-1].argmax(1).tolist(), strict=True):
            text.append(token)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("family", "head_dim", "window"), [("llama", 64, None), ("qwen3", 128, None), ("gemma3_text", 80, 9)]
)
def test_families(
    tmp_path: Path, device: torch.device, family: Family, head_dim: int, window: int | None
) -> None:
    make_model(family, tmp_path, head_dim=head_dim, heads=4, kv_heads=2, layers=2, window=window)
    checkpoint = open_checkpoint(tmp_path, "float32")
    cache = make_cache(checkpoint, len(PROMPTS), max(PROMPTS) + STEPS, 7 * 2 * head_dim * 4)
    weights = load_weights(checkpoint)
    want = logits_of(checkpoint, weights, ReferenceKernels(), moved(cache, torch.device("cpu")))
    there = {name: tensor.to(device) for name, tensor in weights.items()}
    got = logits_of(checkpoint, there, TritonKernels(Scratch(device)), moved(cache, device))
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
