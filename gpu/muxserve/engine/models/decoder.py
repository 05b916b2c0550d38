"""The decoder: every family we serve, built from a `ModelSpec` and canonical weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import Angles, Kernels, KVCache, Norm, QKNorm, RaggedBatch
from muxserve.engine.spec import ModelSpec

Reduce = Callable[[Tensor], None]
"""Adds up, in place, what the ranks of a tensor parallel group have each computed a part of."""
Gather = Callable[[Tensor], Tensor]
"""Puts the ranks' columns `[N, part]` side by side, `[N, whole]`."""


class Decoder:
    """Weights and the forward pass; holds no state of any sequence. Not bound to a thread.

    weights: canonical tensors (see `muxserve.engine.checkpoint.canonical`), used in place; with `reduce` and
    `gather`, this rank's parts of them. Raises KeyError if one is missing.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        kernels: Kernels,
        reduce: Reduce | None = None,
        gather: Gather | None = None,
    ) -> None:
        self.spec = spec
        self._kernels = kernels
        self._gather = gather
        self._embed = weights["embed"]
        self._head = self._embed if spec.tie_embeddings else weights["lm_head"]
        device = self._embed.device
        self._ropes = [
            (
                torch.tensor(rope.inverse_frequencies, dtype=torch.float32, device=device),
                rope.attention_factor,
            )
            for rope in spec.ropes
        ]
        self._layers = [_Layer(spec, index, weights, kernels, reduce) for index in range(len(spec.layers))]
        self._norm = _norm(spec, weights["final_norm"])

    @torch.inference_mode()
    def forward(self, tokens: Tensor, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """Write the tokens' KV to `cache` and return their hidden states, `[N, hidden]`, after the last norm.

        tokens: int64 `[N]`, in the order of `batch`, whose blocks must be allocated.
        """
        kernels = self._kernels
        residual = kernels.embed(tokens, self._embed)
        if self.spec.embedding_scale != 1.0:
            residual *= self.spec.embedding_scale
        dtype = residual.dtype
        angles = [kernels.angles(batch.positions, *rope, dtype) for rope in self._ropes]
        # What a layer adds to the residual stream is added by the norm that follows it.
        added, before = kernels.empty(residual.shape, dtype), None
        for index, layer in enumerate(self._layers):
            with kernels.frame():
                norm = layer.input_norm
                x = kernels.add_norm(added, residual, norm, before) if index else kernels.norm(residual, norm)
                layer.attend(x, angles, batch, cache, added)
                x = kernels.add_norm(added, residual, layer.mlp_norm, layer.attention_out_norm)
                layer.multiply(x, added)
            before = layer.mlp_out_norm
        return kernels.add_norm(added, residual, self._norm, before)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 `[rows, vocab]` of `hidden` `[rows, hidden]`, rows of what `forward` returned."""
        logits = self._kernels.linear(hidden, self._head)
        if self._gather is not None:
            logits = self._gather(logits)
        if (cap := self.spec.final_soft_cap) is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        if logits.dtype == torch.float32:
            return logits
        return self._kernels.empty(logits.shape, torch.float32).copy_(logits)


class _Layer:
    """Attention and gated MLP. The norms around them are applied by the decoder."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        weights: Mapping[str, Tensor],
        kernels: Kernels,
        reduce: Reduce | None,
    ) -> None:
        self._spec = spec
        self._index = index
        self._kernels = kernels
        self._reduce = reduce
        self._window = spec.layers[index].window
        self._rope = spec.layers[index].rope
        of = f"layers.{index}."
        self._qkv, self._qkv_bias = weights[of + "qkv"], weights.get(of + "qkv_bias")
        self._o, self._o_bias = weights[of + "o"], weights.get(of + "o_bias")
        self._gate_up, self._gate_up_bias = weights[of + "gate_up"], weights.get(of + "gate_up_bias")
        self._down, self._down_bias = weights[of + "down"], weights.get(of + "down_bias")
        self.input_norm = _norm(spec, weights[of + "input_norm"])
        self.mlp_norm = _norm(spec, weights[of + "mlp_norm"])
        self.attention_out_norm = self.mlp_out_norm = self._qk_norm = None
        if spec.post_norms:
            self.attention_out_norm = _norm(spec, weights[of + "attention_out_norm"])
            self.mlp_out_norm = _norm(spec, weights[of + "mlp_out_norm"])
        if spec.qk_norm:
            q, k = weights[of + "q_norm"], weights[of + "k_norm"]
            self._qk_norm = QKNorm(q, k, spec.rms_eps, spec.post_norms)

    def attend(
        self, x: Tensor, angles: list[Angles], batch: RaggedBatch, cache: KVCache, out: Tensor
    ) -> None:
        """`[N, hidden]` → `out`, the same."""
        spec, kernels = self._spec, self._kernels
        qkv = kernels.linear(x, self._qkv, self._qkv_bias).view(len(x), -1, spec.head_dim)
        turned = None if self._rope is None else angles[self._rope]
        query = kernels.write(cache, self._index, batch, qkv, spec.heads, turned, self._qk_norm)
        how = (spec.attention_scale, self._window, spec.attention_soft_cap)
        seen = kernels.attend(cache, self._index, batch, query, *how)
        self._project(seen.view(len(x), -1), self._o, self._o_bias, out)

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """The MLP: `[N, hidden]` → `out`, the same."""
        gate_up = self._kernels.linear(x, self._gate_up, self._gate_up_bias)
        gated = self._kernels.gate(gate_up, self._spec.activation)
        self._project(gated, self._down, self._down_bias, out)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if self._reduce is None:
            self._kernels.linear(x, weight, bias, out)
            return
        self._reduce(self._kernels.linear(x, weight, None, out))
        if bias is not None:
            out += bias


def _norm(spec: ModelSpec, weight: Tensor) -> Norm:
    return Norm(weight, spec.rms_eps, spec.post_norms)
