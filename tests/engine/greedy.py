"""Greedy text of a checkpoint, by our decoder and by transformers, for tests to compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from muxserve.engine.checkpoint import Checkpoint, fill
from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.models.decoder import Decoder
from muxserve.engine.spec import KVLayout
from muxserve.engine.weights import map_tensors, weights_memfd
from tests.engine.cpu import CpuEngine

Tokens = list[int]


def load_decoder(checkpoint: Checkpoint) -> Decoder:
    """A decoder over weights that went through a memfd, as an executor gets them."""
    fd = weights_memfd(checkpoint.weight_bytes())
    try:
        fill(checkpoint, fd, threads=1)
        weights = map_tensors(fd, checkpoint.manifest())
    finally:
        os.close(fd)
    return Decoder(checkpoint.spec, weights, ReferenceKernels())


def make_cache(checkpoint: Checkpoint, slots: int, context: int, block_bytes: int) -> KVCache:
    """A cache whose blocks are scattered over an arena full of NaN."""
    spec = checkpoint.spec
    layout = KVLayout(
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        block_bytes=block_bytes,
    )
    spans = layout.spans(context)
    blocks = slots * spans * layout.blocks_per_span
    arena = torch.full((blocks * block_bytes,), 0xFF, dtype=torch.uint8)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return KVCache.over(arena, order.view(layout.layers, slots, layout.kv_heads, spans), layout)


def ragged(slots: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> RaggedBatch:
    """Tokens `[start, end)` of each slot."""
    lengths = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
    slot_ids = torch.tensor(slots)
    return RaggedBatch(
        slots=slot_ids,
        query_starts=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        context_lengths=torch.tensor(ends),
        positions=torch.cat([torch.arange(start, end) for start, end in zip(starts, ends, strict=True)]),
        token_slots=slot_ids.repeat_interleave(lengths),
        max_query=int(lengths.max()),
        max_context=max(ends),
    )


def our_greedy(
    checkpoint: Checkpoint, prompts: Sequence[Tokens], new: int, *, chunk: int, block_bytes: int = 4096
) -> list[Tokens]:
    """`new` tokens of each prompt: prefill of all prompts together in chunks, then decode of all together."""
    context = max(map(len, prompts)) + new
    with CpuEngine(checkpoint, slots=len(prompts), context=context, block_bytes=block_bytes) as engine:
        return engine.generate(prompts, new, chunk=chunk)


def load_reference(path: Path, gguf_file: str | None = None) -> PreTrainedModel:
    """The same checkpoint in transformers, float32; it does not stop at an end of text."""
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra).eval()
    model.generation_config.eos_token_id = None
    return model


def their_greedy(model: PreTrainedModel, prompts: Sequence[Tokens], new: int) -> list[Tokens]:
    """`new` tokens of each prompt, one prompt at a time, unchunked."""
    texts = []
    generate: Any = model.generate
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        texts.append([int(token) for token in text[0, len(prompt) :]])
    return texts
