"""The decoder: every family we serve, built from a `ModelSpec` and canonical weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from muxserve.engine.kernels.interface import AttentionKernels, KVCache, RaggedBatch
from muxserve.engine.models.norm import RMSNorm
from muxserve.engine.models.rope import Rope, rotate
from muxserve.engine.spec import ModelSpec

Angles = list[tuple[Tensor, Tensor]]


class Decoder:
    """Weights and the forward pass; holds no state of any sequence. Not bound to a thread.

    weights: canonical tensors (see `muxserve.engine.checkpoint.canonical`), used in place.
    Raises KeyError if one is missing.
    """

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor], kernels: AttentionKernels) -> None:
        self.spec = spec
        self._embed = weights["embed"]
        self._head = self._embed if spec.tie_embeddings else weights["lm_head"]
        self._ropes = [Rope(rope, self._embed.device) for rope in spec.ropes]
        self._layers = [_Layer(spec, index, weights, kernels) for index in range(len(spec.layers))]
        self._norm = _norm(spec, weights["final_norm"])

    @torch.inference_mode()
    def forward(self, tokens: Tensor, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """Write the tokens' KV to `cache` and return their hidden states.

        tokens: int64 `[N]`, in the order of `batch`, whose blocks must be allocated. Returns `[N, hidden]`
        before the final norm, so that `logits` pays for it only where a token is sampled.
        """
        hidden = F.embedding(tokens, self._embed)
        if self.spec.embedding_scale != 1.0:
            hidden = hidden * self.spec.embedding_scale
        angles = [rope.angles(batch.positions, hidden.dtype) for rope in self._ropes]
        for layer in self._layers:
            hidden = layer.forward(hidden, angles, batch, cache)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 `[rows, vocab]` of `hidden` `[rows, hidden]`, rows of what `forward` returned."""
        logits = F.linear(self._norm(hidden), self._head)
        cap = self.spec.final_soft_cap
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.float()


class _Layer:
    """Attention and gated MLP, each behind a norm, and for Gemma each before one too."""

    def __init__(
        self, spec: ModelSpec, index: int, weights: dict[str, Tensor], kernels: AttentionKernels
    ) -> None:
        self._spec = spec
        self._index = index
        self._kernels = kernels
        self._window = spec.layers[index].window
        self._rope = spec.layers[index].rope
        of = f"layers.{index}."
        self._qkv, self._qkv_bias = weights[of + "qkv"], weights.get(of + "qkv_bias")
        self._o, self._o_bias = weights[of + "o"], weights.get(of + "o_bias")
        self._gate_up, self._gate_up_bias = weights[of + "gate_up"], weights.get(of + "gate_up_bias")
        self._down, self._down_bias = weights[of + "down"], weights.get(of + "down_bias")
        self._input_norm = _norm(spec, weights[of + "input_norm"])
        self._mlp_norm = _norm(spec, weights[of + "mlp_norm"])
        self._attention_out_norm = self._mlp_out_norm = self._qk_norm = None
        if spec.post_norms:
            self._attention_out_norm = _norm(spec, weights[of + "attention_out_norm"])
            self._mlp_out_norm = _norm(spec, weights[of + "mlp_out_norm"])
        if spec.qk_norm:
            # One norm over the heads of Q and K together: a row of weights for each head.
            q, k = weights[of + "q_norm"], weights[of + "k_norm"]
            rows = [q.expand(spec.heads, -1), k.expand(spec.kv_heads, -1)]
            self._qk_norm = _norm(spec, torch.cat(rows))

    def forward(self, hidden: Tensor, angles: Angles, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """`[N, hidden]` → the same."""
        out = self._attention(self._input_norm(hidden), angles, batch, cache)
        hidden = hidden + (out if self._attention_out_norm is None else self._attention_out_norm(out))
        out = self._mlp(self._mlp_norm(hidden))
        return hidden + (out if self._mlp_out_norm is None else self._mlp_out_norm(out))

    def _attention(self, x: Tensor, angles: Angles, batch: RaggedBatch, cache: KVCache) -> Tensor:
        spec = self._spec
        qkv = F.linear(x, self._qkv, self._qkv_bias).view(len(x), -1, spec.head_dim)
        qk, value = qkv[:, : spec.heads + spec.kv_heads], qkv[:, spec.heads + spec.kv_heads :]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        if self._rope is not None:
            qk = rotate(qk, *angles[self._rope])
        query, key = qk[:, : spec.heads], qk[:, spec.heads :]
        self._kernels.write(cache, self._index, batch, key, value)
        out = self._kernels.attend(
            cache, self._index, batch, query, spec.attention_scale, self._window, spec.attention_soft_cap
        )
        return F.linear(out.reshape(len(x), -1), self._o, self._o_bias)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self._gate_up, self._gate_up_bias).chunk(2, dim=-1)
        gate = F.silu(gate) if self._spec.activation == "silu" else F.gelu(gate, approximate="tanh")
        return F.linear(gate * up, self._down, self._down_bias)


def _norm(spec: ModelSpec, weight: Tensor) -> RMSNorm:
    return RMSNorm(weight, spec.rms_eps, getattr(torch, spec.dtype), late=spec.post_norms)
