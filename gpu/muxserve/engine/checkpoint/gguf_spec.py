"""GGUF metadata → `ModelSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.checkpoint.families import embedding_scale
from muxserve.engine.checkpoint.fields import MAX_HEAD_DIM, MAX_LAYERS, Fields
from muxserve.engine.checkpoint.gguf_header import GGUFHeader
from muxserve.engine.checkpoint.rope import plain, yarn, yarn_attention_factor
from muxserve.engine.spec import DType, LayerSpec, ModelSpec, RopeSpec

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", "gemma3")

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn where a chat template uses them; files often name only the end of text."""

GEMMA_27B_LAYERS = 62
"""llama.cpp tells Gemma 3 27B, the one whose query scale is not 1 / sqrt(head_dim), by its layers."""


@dataclass(frozen=True, slots=True)
class _Heads:
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int


def spec_of(header: GGUFHeader, dtype: DType) -> ModelSpec:
    """The spec of a GGUF file. Raises CheckpointError that names the metadata key at fault."""
    general = Fields(header.metadata, "")
    architecture = general.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise general.error(
            "general.architecture",
            f"{architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}",
        )
    if general.integer("split.count", 1, minimum=0) > 1:
        raise general.error(
            "split.count", "the model is split over several files; merge them with gguf-split"
        )
    fields = _section(header, architecture)
    hidden = fields.integer("embedding_length")
    layers = fields.integer("block_count", maximum=MAX_LAYERS)
    sizes = _heads(fields, hidden)
    gemma = architecture == "gemma3"
    ropes, context = _ropes(header, fields, sizes.rotary_dim, gemma)
    has = header.tensors.__contains__
    return ModelSpec(
        architecture="gemma3_text" if gemma else architecture,
        dtype=dtype,
        vocab_size=_vocab_size(header),
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        context_length=context,
        layers=_layers(header, fields, architecture, layers, len(ropes)),
        ropes=ropes,
        rms_eps=round_trip(fields.number("attention.layer_norm_rms_epsilon")),
        activation="gelu_tanh" if gemma else "silu",
        attention_scale=_attention_scale(sizes, hidden, gemma and layers == GEMMA_27B_LAYERS),
        final_soft_cap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=embedding_scale(hidden, dtype) if gemma else 1.0,
        qkv_bias=has("blk.0.attn_q.bias"),
        output_bias=has("blk.0.attn_output.bias"),
        mlp_bias=has("blk.0.ffn_gate.bias"),
        qk_norm=has("blk.0.attn_q_norm.weight"),
        post_norms=gemma,
        tie_embeddings=not has("output.weight"),
        bos_token_id=general.optional_integer("tokenizer.ggml.bos_token_id", minimum=0),
        eos_token_ids=_eos(header, general),
    )


def round_trip(value: float) -> float:
    """The decimal number whose float32 the file holds: 9.999999747378752e-06 was written for 1e-05."""
    return float(str(np.float32(value)))


def _section(header: GGUFHeader, architecture: str) -> Fields:
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)
    }
    return Fields(values, prefix)


def _vocab_size(header: GGUFHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("token_embd.weight", "the checkpoint has no such tensor")
    return embedding.shape[0]


def _heads(fields: Fields, hidden: int) -> _Heads:
    heads = fields.integer("attention.head_count")
    kv_heads = fields.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise fields.error("attention.head_count_kv", f"{kv_heads} does not divide {heads} attention heads")
    if fields.get("attention.key_length") is None and hidden % heads:
        raise fields.error("embedding_length", f"{hidden} is not a multiple of {heads} attention heads")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.value_length", f"must equal attention.key_length, {head_dim}")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise fields.error("attention.key_length", f"must be even and at most {MAX_HEAD_DIM}, got {head_dim}")
    rotary = fields.integer("rope.dimension_count", head_dim)
    if rotary % 2 or rotary > head_dim:
        raise fields.error("rope.dimension_count", f"must be an even part of {head_dim}, got {rotary}")
    return _Heads(heads, kv_heads, head_dim, rotary)


def _attention_scale(sizes: _Heads, hidden: int, by_hidden: bool) -> float:
    return float((hidden / sizes.heads if by_hidden else sizes.head_dim) ** -0.5)


def _layers(
    header: GGUFHeader, fields: Fields, architecture: str, count: int, ropes: int
) -> tuple[LayerSpec, ...]:
    window = fields.optional_integer("attention.sliding_window", minimum=0) or None
    sliding = _sliding(header, fields, architecture, count) if window else (False,) * count
    # SmolLM3 has no position embedding in every fourth layer; llama.cpp has the number in its code too.
    rotated = tuple(architecture != "smollm3" or (i + 1) % 4 != 0 for i in range(count))
    return tuple(
        LayerSpec(
            window=window if slides else None,
            rope=(1 if slides and ropes > 1 else 0) if rotates else None,
        )
        for slides, rotates in zip(sliding, rotated, strict=True)
    )


def _sliding(header: GGUFHeader, fields: Fields, architecture: str, count: int) -> tuple[bool, ...]:
    """Which layers have the window: by pattern (one full layer in every n, or a flag per layer), else all."""
    key = "attention.sliding_window_pattern"
    flags = header.array(f"{architecture}.{key}")
    if flags is not None:
        if len(flags) != count:
            raise fields.error(key, f"must have {count} items, has {len(flags)}")
        return tuple(bool(flag) for flag in flags)
    pattern = fields.integer(key, 6 if architecture == "gemma3" else 0, minimum=0)
    return tuple(pattern == 0 or (i + 1) % pattern != 0 for i in range(count))


def _ropes(header: GGUFHeader, fields: Fields, dim: int, gemma: bool) -> tuple[tuple[RopeSpec, ...], int]:
    """Ropes (for Gemma: of full, then of sliding layers) and the context that they serve."""
    context = fields.integer("context_length")
    theta = fields.number("rope.freq_base", 1e6 if gemma else 1e4)
    if theta <= 1:
        raise fields.error("rope.freq_base", f"must be above 1, got {theta}")
    base = plain(theta, dim) / _factors(header, dim)
    kind = fields.text("rope.scaling.type", "none")
    attention = 1.0
    if kind == "linear":
        base = base / fields.number("rope.scaling.factor")
    elif kind == "yarn":
        factor = fields.number("rope.scaling.factor")
        original = fields.integer("rope.scaling.original_context_length", context)
        fast = fields.number("rope.scaling.yarn_beta_fast", 32.0)
        slow = fields.number("rope.scaling.yarn_beta_slow", 1.0)
        base = yarn(base, theta, factor, original, fast, slow, truncate=True)
        attention = fields.number("rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor)
        context = max(context, int(original * factor))
    elif kind == "longrope":
        context = min(context, fields.integer("rope.scaling.original_context_length", context))
        attention = fields.number("rope.scaling.attn_factor", 1.0)
    elif kind != "none":
        raise fields.error(
            "rope.scaling.type", f"{kind!r} is not supported; supported: none, linear, yarn, longrope"
        )
    full = RopeSpec(inverse_frequencies=tuple(map(float, base)), attention_factor=attention)
    if not gemma:
        return (full,), context
    local = plain(fields.number("rope.freq_base_swa", 1e4), dim)
    return (full, RopeSpec(inverse_frequencies=tuple(map(float, local)))), context


def _factors(header: GGUFHeader, dim: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Divisors of the frequencies that the file gives (Llama 3.1's scaling, longrope's short set)."""
    for name in ("rope_freqs.weight", "rope_factors_short.weight"):
        tensor = header.tensors.get(name)
        if tensor is None:
            continue
        if tensor.kind.name != "F32" or tensor.shape != (dim // 2,):
            raise CheckpointError(
                name, f"must be {dim // 2} float32, is {list(tensor.shape)} {tensor.kind.name}"
            )
        return np.frombuffer(header.data[tensor.start : tensor.stop], np.float32).astype(np.float64)
    return np.ones(dim // 2)


def _eos(header: GGUFHeader, general: Fields) -> tuple[int, ...]:
    """The end of text, of a turn and of a message, and the template's own end of turn."""
    ids: list[int] = []
    for key in ("eos", "eot", "eom"):
        ids.extend(general.token_ids(f"tokenizer.ggml.{key}_token_id"))
    template = header.metadata.get("tokenizer.chat_template")
    wanted = [text for text in END_OF_TURN if isinstance(template, str) and text in template]
    if wanted:
        tokens: Sequence[object] = header.array("tokenizer.ggml.tokens") or ()
        ids.extend(tokens.index(text) for text in wanted if text in tokens)
    return tuple(dict.fromkeys(ids))
