"""What a model is made of (`ModelSpec`) and how its KV is cut into blocks (`KVLayout`). No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["float32", "bfloat16", "float16"]
ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding of a layer.

    `inverse_frequencies` has `rotary_dim / 2` entries with any scaling (linear, llama3, yarn, longrope)
    already applied, so the decoder knows nothing of scaling kinds; `attention_factor` multiplies cos and sin.
    Rotation is the half-split ("neox") form, as in transformers.
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer. `window`: positions a query sees including its own, None = all. `rope`: index into
    `ModelSpec.ropes`, None = no position embedding."""

    window: int | None = None
    rope: int | None = 0


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the decoder is built from; produced from a checkpoint's configuration, never by hand.

    Norm weights are canonical (Gemma's `1 + w` is applied at load), so there is one RMSNorm.
    """

    architecture: str
    dtype: DType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    rms_eps: float
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float = 1.0
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    """True: Gemma's sandwich (norm after attention and after the MLP, before the residual add)."""
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How one model's KV is cut into blocks of an arena.

    A block is `[2 (K, V), tokens_per_block, head_dim]` of `dtype` at byte `block_id * block_bytes`; bytes
    past `2 * tokens_per_block * head_dim * itemsize` are unused.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType
    block_bytes: int

    @property
    def tokens_per_block(self) -> int:
        """T: tokens in one span. 0 means that a block is too small for one token of this model."""
        return self.block_bytes // (2 * self.head_dim * ITEMSIZE[self.dtype])

    @property
    def blocks_per_span(self) -> int:
        """Blocks in a block group: layers × kv_heads."""
        return self.layers * self.kv_heads

    def spans(self, tokens: int) -> int:
        """Block groups that hold `tokens` tokens."""
        return -(-tokens // self.tokens_per_block)
