"""A rank's `Decoder`: its part of the weights, and sums and logits over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import msgspec
from torch import Tensor

from muxserve.engine.kernels.interface import Kernels
from muxserve.engine.models.decoder import Decoder
from muxserve.engine.parallel.group import Collectives
from muxserve.engine.parallel.shard import Shard


def parallel_decoder(
    shard: Shard, weights: Mapping[str, Tensor], kernels: Kernels, collectives: Collectives
) -> Decoder:
    """For one lane, whose `collectives` it uses; lanes share `weights`, which are those of `shard.tensors()`.

    All ranks call `forward` and `logits` in the same order, with the same tokens and batch, and get the same
    logits, of the whole vocabulary. Raises KeyError if a weight is missing.
    """
    spec = shard.spec
    if spec.tie_embeddings:
        # The rank's rows of the head are rows of the embedding, which it has: no copy.
        rows = shard.vocabulary
        weights = {**weights, "lm_head": weights["embed"][rows.start : rows.stop]}
        spec = msgspec.structs.replace(spec, tie_embeddings=False)
    gather = partial(collectives.gather, width=shard.vocabulary_width, columns=shard.whole.vocab_size)
    return Decoder(spec, weights, kernels, collectives.reduce, gather)
