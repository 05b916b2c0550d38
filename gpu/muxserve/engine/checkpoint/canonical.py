"""The one naming of weights that loader, executors and decoder share.

    embed                       [vocab, hidden]
    layers.{i}.input_norm       [hidden]                                float32
    layers.{i}.qkv              [(heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v
    layers.{i}.qkv_bias         [(heads + 2 * kv_heads) * head_dim]     if qkv_bias
    layers.{i}.q_norm, .k_norm  [head_dim]                              float32, if qk_norm
    layers.{i}.o                [hidden, heads * head_dim]
    layers.{i}.o_bias           [hidden]                                if output_bias
    layers.{i}.attention_out_norm [hidden]                              float32, if post_norms
    layers.{i}.mlp_norm         [hidden]                                float32
    layers.{i}.gate_up          [2 * intermediate, hidden]: gate, then up
    layers.{i}.gate_up_bias     [2 * intermediate]                      if mlp_bias
    layers.{i}.down             [hidden, intermediate]
    layers.{i}.down_bias        [hidden]                                if mlp_bias
    layers.{i}.mlp_out_norm     [hidden]                                float32, if post_norms
    final_norm                  [hidden]                                float32
    lm_head                     [vocab, hidden]                         unless tie_embeddings

Everything without a dtype is in the model's dtype. Matrices are `[out, in]`, rows of Q and K in half-split
rotary order, norm weights the factors themselves (Gemma's `1 + w` is applied).

This is the layout "canonical". In the layout "panels", matrices are packed (`muxserve.engine.packing`), gate
and up in shared panels, each on pages of its own, and all else is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from muxserve.engine.messages import TensorEntry, WeightLayout
from muxserve.engine.packing import packed_shape
from muxserve.engine.spec import ITEMSIZE, ModelSpec

ALIGNMENT = 64
MATRIX_ALIGNMENT = 4096
"""Of packed matrices: a page, so that no two of them share one."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CanonicalTensor:
    """One tensor of the list above.

    role: the name without its layer. dtype: in the canonical layout. parts: shapes of what it is joined from
    along axis 0, at least one.
    """

    role: str
    layer: int | None
    dtype: str
    parts: tuple[Shape, ...]

    @property
    def name(self) -> str:
        return self.role if self.layer is None else f"layers.{self.layer}.{self.role}"

    @property
    def shape(self) -> Shape:
        return (sum(part[0] for part in self.parts), *self.parts[0][1:])

    @property
    def is_matrix(self) -> bool:
        return len(self.parts[0]) == 2

    @property
    def shared_panels(self) -> int:
        """Matrices that share panels, if packed."""
        return 2 if self.role == "gate_up" else 1

    def packed_shape(self) -> Shape:
        """Shape of this matrix in the layout "panels"."""
        rows, columns = self.parts[0] if self.shared_panels > 1 else self.shape
        return packed_shape(rows, columns, ITEMSIZE[self.dtype], self.shared_panels)


def canonical_tensors(spec: ModelSpec) -> Iterator[CanonicalTensor]:
    """Every tensor of the model, in the order in which they lie in memory."""
    vocab, hidden = spec.vocab_size, spec.hidden_size
    yield CanonicalTensor("embed", None, spec.dtype, ((vocab, hidden),))
    for layer in range(len(spec.layers)):
        yield from _layer(spec, layer)
    yield CanonicalTensor("final_norm", None, "float32", ((hidden,),))
    if not spec.tie_embeddings:
        yield CanonicalTensor("lm_head", None, spec.dtype, ((vocab, hidden),))


def _layer(spec: ModelSpec, layer: int) -> Iterator[CanonicalTensor]:
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.heads * dim, spec.kv_heads * dim

    def tensor(role: str, *parts: Shape) -> CanonicalTensor:
        return CanonicalTensor(role, layer, "float32" if role.endswith("norm") else spec.dtype, parts)

    yield tensor("input_norm", (hidden,))
    yield tensor("qkv", (q, hidden), (kv, hidden), (kv, hidden))
    if spec.qkv_bias:
        yield tensor("qkv_bias", (q,), (kv,), (kv,))
    if spec.qk_norm:
        yield tensor("q_norm", (dim,))
        yield tensor("k_norm", (dim,))
    yield tensor("o", (hidden, q))
    if spec.output_bias:
        yield tensor("o_bias", (hidden,))
    if spec.post_norms:
        yield tensor("attention_out_norm", (hidden,))
    yield tensor("mlp_norm", (hidden,))
    yield tensor("gate_up", (inner, hidden), (inner, hidden))
    if spec.mlp_bias:
        yield tensor("gate_up_bias", (inner,), (inner,))
    yield tensor("down", (hidden, inner))
    if spec.mlp_bias:
        yield tensor("down_bias", (hidden,))
    if spec.post_norms:
        yield tensor("mlp_out_norm", (hidden,))


def lay_out(
    tensors: Iterable[CanonicalTensor], layout: WeightLayout = "canonical"
) -> tuple[TensorEntry, ...]:
    """Where each of these tensors lies in the model's weight memory."""
    entries = []
    offset = 0
    for tensor in tensors:
        dtype, shape, alignment = tensor.dtype, tensor.shape, ALIGNMENT
        if layout == "panels" and tensor.is_matrix:
            shape, alignment = tensor.packed_shape(), MATRIX_ALIGNMENT
        elif layout == "panels":
            dtype = "float32"
        offset = -(-offset // alignment) * alignment
        entries.append(TensorEntry(name=tensor.name, dtype=dtype, shape=shape, offset=offset))
        offset += math.prod(shape) * ITEMSIZE[dtype]
    return tuple(entries)


def manifest_bytes(entries: tuple[TensorEntry, ...]) -> int:
    """Bytes of the memory that holds these tensors."""
    if not entries:
        return 0
    last = entries[-1]
    return last.offset + -(-math.prod(last.shape) * ITEMSIZE[last.dtype] // ALIGNMENT) * ALIGNMENT
