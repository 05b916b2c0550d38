"""Run as a program: every kernel, as it would be launched on an H200, compiled; figures as JSON, one a line.

Arguments: head sizes. TRITON_CACHE_DIR says where Triton may write.
"""

from __future__ import annotations

import json
import sys

from tests.engine.triton.compiling import Compiled, compiling  # first: it settles that nothing is interpreted

# isort: split
import torch

from muxserve.engine.kernels.interface import KVCache, Norm, QKNorm
from muxserve.engine.kernels.triton import tuning
from muxserve.engine.kernels.triton.advance import advance
from muxserve.engine.kernels.triton.angles import angles
from muxserve.engine.kernels.triton.decode import decode_attention
from muxserve.engine.kernels.triton.gates import gate_mul
from muxserve.engine.kernels.triton.norms import add_rms_norm, rms_norm
from muxserve.engine.kernels.triton.prefill import prefill_attention
from muxserve.engine.kernels.triton.sample import sample
from muxserve.engine.kernels.triton.write import write_qkv
from muxserve.engine.messages import Sampling
from muxserve.engine.sampler import SamplingBatch
from muxserve.engine.spec import KVLayout

ROWS, HEADS, KV_HEADS = 32, 32, 8


def heads_of(head_dim: int, *, fancy: bool) -> list[Compiled]:
    """What depends on the head size; fancy: with window, soft cap and QK norm."""
    layout = KVLayout(layers=1, kv_heads=KV_HEADS, head_dim=head_dim, dtype="bfloat16", block_bytes=16 * 1024)
    table = torch.zeros(1, ROWS, KV_HEADS, 256, dtype=torch.int32)
    cache = KVCache.over(torch.zeros(1 << 17, dtype=torch.uint8), table, layout)
    rows, starts = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS + 1, dtype=torch.int64)
    qkv = torch.zeros(ROWS, HEADS + 2 * KV_HEADS, head_dim, dtype=torch.bfloat16)
    angle = torch.zeros(ROWS, 1, head_dim // 2, dtype=torch.bfloat16)
    norm = QKNorm(torch.zeros(head_dim), torch.zeros(head_dim), 1e-6, True) if fancy else None
    how = (0.1, 512, 30.0) if fancy else (0.1, None, None)
    with compiling() as found:
        write_qkv(cache, 0, rows, rows, qkv, HEADS, (angle, angle), norm)
        query = torch.zeros(ROWS, HEADS, head_dim, dtype=torch.bfloat16)
        decode_attention(cache, 0, rows, rows, query, *how, longest=8192)
        prefill_attention(cache, 0, rows, starts, rows, query, *how)
    return found


def the_others() -> list[Compiled]:
    rows = [Sampling(top_p=0.9, repetition_penalty=1.1, stop_token_ids=(1, 2)) for _ in range(ROWS)]
    batch = SamplingBatch.build(rows, slots=range(ROWS), limits=[100] * ROWS)
    positions, tokens = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, 8192, dtype=torch.int32)
    x, weight = torch.zeros(ROWS, 4096, dtype=torch.bfloat16), torch.zeros(4096)
    with compiling() as compiled:
        found = sample(torch.zeros(ROWS, 128_256), batch, positions, tokens)
        outcome, known = torch.zeros(2, ROWS, dtype=torch.int64)
        advance(found, outcome, known, positions, known, tokens)
        angles(positions, torch.zeros(64), 1.0, torch.bfloat16)
        rms_norm(x, Norm(weight, 1e-5, late=False))
        add_rms_norm(x, x, Norm(weight, 1e-5, late=True), Norm(weight, 1e-5, late=True))
        gate_mul(x, "silu")
        gate_mul(x, "gelu_tanh")
    return compiled


def main() -> None:
    tuning.device_class = lambda device: "h200"  # type: ignore[assignment]
    for head_dim in map(int, sys.argv[1:]):
        for fancy in (False, True):
            for one in heads_of(head_dim, fancy=fancy):
                sys.stdout.write(json.dumps({"head_dim": head_dim, "fancy": fancy, **one.figures()}) + "\n")
    for one in the_others():
        sys.stdout.write(json.dumps({"head_dim": 0, "fancy": False, **one.figures()}) + "\n")


if __name__ == "__main__":
    main()
