"""`Shape`: models of the sizes that people serve, with random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from muxserve.engine.checkpoint.canonical import canonical_tensors, lay_out
from muxserve.engine.messages import TensorEntry
from muxserve.engine.spec import ITEMSIZE, DType, KVLayout, LayerSpec, ModelSpec, RopeSpec


@dataclass(frozen=True)
class Shape:
    """What a model's speed depends on. bytes and operations are those of its matrices."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    theta: float = 10_000.0
    tied: bool = False
    qk_norm: bool = False
    dtype: DType = "bfloat16"

    @cached_property
    def spec(self) -> ModelSpec:
        half = self.head_dim // 2
        frequencies = tuple(self.theta ** (-i / half) for i in range(half))
        return ModelSpec(
            architecture="random",
            dtype=self.dtype,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            context_length=1 << 17,
            layers=(LayerSpec(),) * self.layers,
            ropes=(RopeSpec(inverse_frequencies=frequencies),),
            rms_eps=1e-5,
            attention_scale=self.head_dim**-0.5,
            qk_norm=self.qk_norm,
            tie_embeddings=self.tied,
        )

    @cached_property
    def manifest(self) -> tuple[TensorEntry, ...]:
        """Where each of its weights lies."""
        return lay_out(canonical_tensors(self.spec))

    def layout(self, block_bytes: int) -> KVLayout:
        """How its KV lies in blocks of that size."""
        return layout_of(self.spec, block_bytes)

    @property
    def head_parameters(self) -> int:
        """Of the product that makes logits."""
        return self.vocabulary * self.hidden

    @cached_property
    def layer_parameters(self) -> int:
        """Of all matrices of all layers."""
        return sum(
            math.prod(tensor.shape)
            for tensor in canonical_tensors(self.spec)
            if tensor.layer is not None and tensor.is_matrix
        )

    @property
    def step_weight_bytes(self) -> int:
        """Read at each decode step, whatever the batch: matrices, and not the embeddings of other tokens."""
        return (self.layer_parameters + self.head_parameters) * ITEMSIZE[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * ITEMSIZE[self.dtype]

    def attention_flop(self, begin: int, end: int) -> int:
        """Of the queries at `[begin, end)` of one sequence, over all layers: each sees itself and what was
        before it."""
        keys = (end - begin) * (begin + 1 + end) // 2
        return 4 * self.layers * self.heads * self.head_dim * keys

    def products(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's products."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, q + 2 * kv),
            (q, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]


LLAMA_3_8B = Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128_256, theta=500_000.0)
LLAMA_2_7B = Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32_000)
QWEN3_4B = Shape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151_936, theta=1_000_000.0, tied=True, qk_norm=True)
SHAPES = (LLAMA_3_8B, LLAMA_2_7B, QWEN3_4B)
TINY_SHAPES = (
    Shape("tiny", 2, 128, 192, 4, 2, 64, 300, dtype="float32"),
    Shape("tiny MHA", 1, 128, 96, 2, 2, 64, 200, dtype="float32"),
    Shape("tiny Qwen3", 1, 64, 96, 4, 1, 64, 200, tied=True, qk_norm=True, dtype="float32"),
)


def layout_of(spec: ModelSpec, block_bytes: int) -> KVLayout:
    """How a model's KV lies in blocks of that size."""
    return KVLayout(
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        block_bytes=block_bytes,
    )


def fill_weights(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Random weights of the scale that trained ones have; norms are ones, biases zeros."""
    device = next(iter(tensors.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=generator)
