"""Inverse frequencies of rotary embeddings, with their scaling applied.

Formulas as in the sources named at each function and as transformers evaluates them; computed in float64 and
rounded to float32 by the decoder.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.checkpoint.fields import Fields
from muxserve.engine.spec import RopeSpec

Frequencies = NDArray[np.float64]

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def plain(theta: float, dim: int) -> Frequencies:
    """`theta ** (-2i / dim)` for i in [0, dim / 2) (RoFormer, arXiv 2104.09864)."""
    exponents: Frequencies = -np.arange(0, dim, 2, dtype=np.float64) / dim
    return np.power(theta, exponents, dtype=np.float64)


def llama3(base: Frequencies, factor: float, low: float, high: float, original: int) -> Frequencies:
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    turns = original * base / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * base / factor + blend * base


def yarn(
    base: Frequencies, theta: float, factor: float, original: int, fast: float, slow: float, truncate: bool
) -> Frequencies:
    """NTK by parts (YaRN, arXiv 2309.00071, section 3.2): dimensions that turn more than `fast` times over
    the original context are kept, fewer than `slow` times are stretched by `factor`, a ramp between."""
    dim = 2 * len(base)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    scaled: Frequencies = base * (1 - ramp) + base / factor * ramp
    return scaled


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Growth of the logits' temperature (YaRN, equation 22), as a factor of cos and sin."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_spec(fields: Fields, theta: float, head_dim: int, context: int, original: int | None) -> RopeSpec:
    """RopeSpec of one `rope_parameters` or `rope_scaling` object of a Hugging Face configuration.

    theta, context, original: the configuration's `rope_theta`, `max_position_embeddings` and
    `original_max_position_embeddings`, which apply where the object does not say. "dynamic" is plain within
    `max_position_embeddings`, the context that we serve; "longrope" uses its short factors, see
    `served_context`. Raises CheckpointError.
    """
    theta = fields.number("rope_theta", theta)
    if theta <= 1:
        raise fields.error("rope_theta", f"must be above 1, got {theta}")
    dim = rotary_dim(fields, head_dim)
    kind = kind_of(fields)
    base = plain(theta, dim)
    if kind in ("default", "dynamic"):
        return _spec(base)
    if kind == "linear":
        return _spec(base / fields.number("factor"))
    original = original or fields.integer("original_max_position_embeddings", context, minimum=2)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            raise fields.error("high_freq_factor", f"must be above low_freq_factor, got {high} and {low}")
        return _spec(llama3(base, fields.number("factor"), low, high, original))
    factor = fields.number("factor", context / original)
    if kind == "yarn":
        fast, slow = fields.number("beta_fast", 32.0), fields.number("beta_slow", 1.0)
        truncate = fields.flag("truncate", True)
        scaled = yarn(base, theta, factor, original, fast, slow, truncate)
        return _spec(scaled, _yarn_attention(fields, factor))
    stretch = np.asarray(fields.numbers("short_factor", dim // 2))
    if stretch.min() <= 0:
        raise fields.error("short_factor", "must hold positive numbers")
    scaled = base / stretch
    growth = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return _spec(scaled, fields.number("attention_factor", growth))


def _yarn_attention(fields: Fields, factor: float) -> float:
    given = fields.optional_number("attention_factor")
    if given is not None:
        return given
    mscale, all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
    if mscale and all_dim:
        above = yarn_attention_factor(factor, fields.number("mscale"))
        return above / yarn_attention_factor(factor, fields.number("mscale_all_dim"))
    return yarn_attention_factor(factor)


def served_context(fields: Fields, context: int, original: int | None) -> int:
    """The longest sequence that the frequencies of `rope_spec` are right for.

    longrope has two sets, and a sequence that crosses the original context would need its keys rotated anew;
    it is served within the original context, where the short set holds. yarn reaches `factor` times that.
    """
    kind = kind_of(fields)
    if kind not in ("yarn", "longrope"):
        return context
    original = original or fields.integer("original_max_position_embeddings", context)
    if kind == "longrope":
        return min(context, original)
    return max(context, int(original * fields.number("factor", context / original)))


def kind_of(fields: Fields) -> str:
    """The scaling kind, under its newer or its older key. Raises CheckpointError if not one of KINDS."""
    key = "rope_type" if fields.get("rope_type") is not None else "type"
    kind = fields.text(key, "default")
    if kind not in KINDS:
        raise fields.error(key, f"{kind!r} is not supported; supported: {', '.join(KINDS)}")
    return kind


def rotary_dim(fields: Fields, head_dim: int) -> int:
    """Leading dimensions of a head that rotate."""
    dim = int(head_dim * fields.number("partial_rotary_factor", 1.0))
    if dim < 2 or dim > head_dim or dim % 2:
        raise fields.error("partial_rotary_factor", f"gives {dim} of {head_dim} dimensions, not an even part")
    return dim


def _spec(frequencies: Frequencies, attention_factor: float = 1.0) -> RopeSpec:
    return RopeSpec(
        inverse_frequencies=tuple(float(value) for value in frequencies), attention_factor=attention_factor
    )
