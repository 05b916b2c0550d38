"""`config.json` of each model family → `ModelSpec`. Absent keys take transformers' defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from muxserve.engine.checkpoint.base import NUMPY_DTYPES
from muxserve.engine.checkpoint.fields import MAX_HEAD_DIM, MAX_LAYERS, Fields
from muxserve.engine.checkpoint.rope import rope_spec, served_context
from muxserve.engine.spec import DType, LayerSpec, ModelSpec, RopeSpec

DEFAULTS: dict[str, dict[str, object]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048},
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "smollm3": {
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
}

FAMILIES = (*DEFAULTS, "gemma3")

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

SLIDING, FULL = "sliding_attention", "full_attention"


def spec_of(config: Mapping[str, object], dtype: DType, eos_token_ids: tuple[int, ...] | None) -> ModelSpec:
    """The spec of a Hugging Face configuration.

    eos_token_ids: those of generation_config.json, which win over the configuration's; None = it names none.
    Raises CheckpointError that names the key at fault.
    """
    outer = Fields(config, "config.json:")
    family = family_of(outer)
    fields, tie = outer, None
    if family == "gemma3":
        fields = outer.section("text_config") or Fields({}, "config.json:text_config.")
        family = "gemma3_text"
        # The head belongs to the whole model, so the outer configuration says whether it is tied.
        tie = outer.flag("tie_word_embeddings", True)
    fields = fields.with_defaults(DEFAULTS[family])
    if eos_token_ids is None:
        eos_token_ids = (outer if "eos_token_id" in outer else fields).token_ids("eos_token_id")
    if tie is None:
        tie = fields.flag("tie_word_embeddings", False)
    return _build(family, fields, dtype, tie, eos_token_ids)


def family_of(fields: Fields) -> str:
    """One of FAMILIES."""
    method = fields.section("quantization_config")
    if method is not None:
        name = method.text("quant_method", "unknown")
        raise fields.error("quantization_config", f"{name} weights are not supported; use plain ones or GGUF")
    family = fields.text("model_type")
    if family not in FAMILIES:
        raise fields.error("model_type", f"{family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return family


def _build(family: str, fields: Fields, dtype: DType, tie: bool, eos_token_ids: tuple[int, ...]) -> ModelSpec:
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
    hidden, gemma = fields.integer("hidden_size"), family == "gemma3_text"
    head_dim = _head_dim(fields, hidden, heads)
    layers, ropes, context = _layers(family, fields, head_dim)
    bias = family != "mistral" and family != "qwen2" and fields.flag("attention_bias", False)
    mlp_bias = family in ("llama", "smollm3") and fields.flag("mlp_bias", False)
    scale = fields.number("query_pre_attn_scalar") if gemma else head_dim
    return ModelSpec(
        architecture=family,
        dtype=dtype,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context,
        layers=layers,
        ropes=ropes,
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        activation=_activation(fields, "hidden_activation" if gemma else "hidden_act"),
        attention_scale=scale**-0.5,
        # No attention_soft_cap: attn_logit_softcapping in a Gemma 3 configuration is a leftover of Gemma 2.
        final_soft_cap=fields.optional_number("final_logit_softcapping") if gemma else None,
        embedding_scale=embedding_scale(hidden, dtype) if gemma else 1.0,
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3" or gemma,
        post_norms=gemma,
        tie_embeddings=tie,
        bos_token_id=fields.optional_integer("bos_token_id", minimum=0),
        eos_token_ids=eos_token_ids,
    )


def embedding_scale(hidden: int, dtype: DType) -> float:
    """sqrt(hidden) as Gemma multiplies by it: rounded to the model's dtype."""
    return float(np.asarray(math.sqrt(hidden)).astype(NUMPY_DTYPES[dtype]))


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    head_dim = fields.optional_integer("head_dim", maximum=MAX_HEAD_DIM)
    if head_dim is None:
        if hidden % heads:
            raise fields.error("hidden_size", f"{hidden} is not a multiple of {heads} attention heads")
        head_dim = hidden // heads
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise fields.error("head_dim", f"must be even and at most {MAX_HEAD_DIM}, got {head_dim}")
    return head_dim


def _activation(fields: Fields, key: str) -> Literal["silu", "gelu_tanh"]:
    name = fields.text(key, "silu")
    if name not in ACTIVATIONS:
        raise fields.error(key, f"{name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _layers(
    family: str, fields: Fields, head_dim: int
) -> tuple[tuple[LayerSpec, ...], tuple[RopeSpec, ...], int]:
    """Layers, ropes, and the longest context that they serve."""
    count = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    kinds = _layer_kinds(family, fields, count)
    window = fields.optional_integer("sliding_window") if SLIDING in kinds else None
    ropes, context = _ropes(family, fields, head_dim)
    index = {kind: position if len(ropes) > 1 else 0 for position, kind in enumerate((FULL, SLIDING))}
    rotated = _rotated(family, fields, count)
    layers = tuple(
        LayerSpec(window=window if kind == SLIDING else None, rope=index[kind] if rotates else None)
        for kind, rotates in zip(kinds, rotated, strict=True)
    )
    return layers, ropes, context


def _layer_kinds(family: str, fields: Fields, count: int) -> tuple[str, ...]:
    windowed = fields.get("sliding_window") is not None
    if family == "llama":
        return (FULL,) * count
    if family == "mistral":
        # Every layer or none, whatever `layer_types` says: so does transformers' Mistral.
        return (SLIDING if windowed else FULL,) * count
    if family == "gemma3_text":
        if fields.get("use_bidirectional_attention"):
            raise fields.error("use_bidirectional_attention", "is not supported: only causal models are")
    else:
        windowed = windowed and fields.flag("use_sliding_window", False)
    kinds = fields.texts("layer_types", count) or _default_kinds(family, fields, count)
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise fields.error("layer_types", f"{kind!r} is not supported; supported: {FULL}, {SLIDING}")
    return kinds if windowed else (FULL,) * count


def _default_kinds(family: str, fields: Fields, count: int) -> tuple[str, ...]:
    if family == "gemma3_text":
        key = "sliding_window_pattern" if "sliding_window_pattern" in fields else "_sliding_window_pattern"
        pattern = fields.integer(key, 6)
        return tuple(FULL if (i + 1) % pattern == 0 else SLIDING for i in range(count))
    if family == "smollm3":
        return tuple(FULL if rotates else SLIDING for rotates in _rotated(family, fields, count))
    first = fields.integer("max_window_layers", 28, minimum=0)
    return tuple(SLIDING if i >= first else FULL for i in range(count))


def _rotated(family: str, fields: Fields, count: int) -> tuple[bool, ...]:
    """Which layers have position embeddings."""
    if family != "smollm3":
        return (True,) * count
    if fields.get("no_rope_layers") is not None:
        return tuple(value != 0 for value in fields.numbers("no_rope_layers", count))
    interval = fields.integer("no_rope_layer_interval", 4)
    return tuple((i + 1) % interval != 0 for i in range(count))


def _ropes(family: str, fields: Fields, head_dim: int) -> tuple[tuple[RopeSpec, ...], int]:
    """Ropes (of full layers, and if they have their own, of sliding layers) and the context they serve.

    Newer files have `rope_parameters`, of the model or per layer type; older ones `rope_theta`,
    `rope_scaling` and, for Gemma, `rope_local_base_freq`. `rope_scaling` wins where both are given.
    """
    context = fields.integer("max_position_embeddings")
    original = fields.optional_integer("original_max_position_embeddings")
    given = fields.section("rope_parameters")
    scaling = fields.section("rope_scaling")
    nested = given is not None and (FULL in given or SLIDING in given)
    partial = {"partial_rotary_factor": fields.get("partial_rotary_factor")}
    empty = Fields({}, "config.json:rope_parameters.")
    if family == "gemma3_text":
        full = (given.section(FULL) if given is not None else None) or empty
        local = (given.section(SLIDING) if given is not None else None) or empty
        if scaling is not None:
            full = scaling
        thetas = (fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4))
    else:
        theta = fields.number("rope_theta", 1e4)
        thetas = (theta, theta)
        if nested and given is not None and scaling is None:
            full = given.section(FULL) or empty
            local = given.section(SLIDING) or full
        else:
            full = local = scaling or given or empty
    sections = tuple(section.with_defaults(partial) for section in (full, local))
    full_spec, local_spec = (
        rope_spec(section, theta, head_dim, context, original)
        for section, theta in zip(sections, thetas, strict=True)
    )
    served = min(served_context(section, context, original) for section in sections)
    return ((full_spec,) if full_spec == local_spec else (full_spec, local_spec)), served
