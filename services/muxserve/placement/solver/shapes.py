"""`Shape`: what a model's memory and work follow from, and the shapes that workloads may name."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
ITEM = 2
"""Bytes of a weight, and of an element of K or V: 16 bits."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with gated feed-forward layers."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    """Whether embedding and output matrix are one."""

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All weights; norms, which are too few to matter, are left out."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings

    @property
    def active_parameters(self) -> int:
        """Weights that a token is multiplied with: all but the embedding table, of which it takes a row."""
        return self.layers * self.layer_parameters + self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on all devices together."""
        return self.parameters * ITEM

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token on all devices together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * ITEM

    def splits(self, degree: int) -> bool:
        """Whether `degree` devices can share it by heads."""
        return self.heads % degree == 0 and (self.kv_heads % degree == 0 or degree % self.kv_heads == 0)


SHAPES = {
    "llama-7b": Shape(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-13b": Shape(40, 5120, 40, 40, 128, 13824, 32000),
    "llama-30b": Shape(60, 6656, 52, 52, 128, 17920, 32000),
    "llama-65b": Shape(80, 8192, 64, 64, 128, 22016, 32000),
    "llama-2-7b": Shape(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-2-13b": Shape(40, 5120, 40, 40, 128, 13824, 32000),
    "llama-2-70b": Shape(80, 8192, 64, 8, 128, 28672, 32000),
    "llama-3-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3-70b": Shape(80, 8192, 64, 8, 128, 28672, 128256),
    "mistral-7b": Shape(32, 4096, 32, 8, 128, 14336, 32000),
    "qwen3-4b": Shape(36, 2560, 32, 8, 128, 9728, 151936, tied=True),
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-14b": Shape(40, 5120, 40, 8, 128, 17408, 151936),
    "qwen3-32b": Shape(64, 5120, 64, 8, 128, 25600, 151936),
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True),
    "smollm2-360m": Shape(32, 960, 15, 5, 64, 2560, 49152, tied=True),
    "smollm2-1.7b": Shape(24, 2048, 32, 32, 64, 8192, 49152, tied=True),
}
"""Published configurations. Other models state their shape in the workload."""
