"""Every Triton kernel against plain torch, on shapes that models have: how far off is the worst element.

Attention against float64; what rounds as the decoder does, against the reference kernels. Of each, the
largest |error| / max(1, |value|), and the bound that it has to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.sequences import dense_attention, filled
from benchmarks.gpu.side import side_by_side
from muxserve.engine.kernels.interface import KVCache, Norm, QKNorm, RaggedBatch
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.kernels.triton.angles import angles
from muxserve.engine.kernels.triton.decode import decode_attention
from muxserve.engine.kernels.triton.gates import gate_mul
from muxserve.engine.kernels.triton.norms import add_rms_norm, rms_norm
from muxserve.engine.kernels.triton.prefill import prefill_attention
from muxserve.engine.kernels.triton.sample import sample
from muxserve.engine.kernels.triton.write import write_qkv
from muxserve.engine.messages import Sampling
from muxserve.engine.sampler import SamplingBatch
from muxserve.engine.sampler import sample as sample_on_host
from muxserve.engine.spec import DType, KVLayout

BOUND: dict[DType, float] = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}
"""Of attention, where the softmax's weights and the result are rounded."""
ULP: dict[DType, float] = {"float32": 2**-20, "bfloat16": 2**-7, "float16": 2**-10}
"""Of what may round the other way."""
PIECES = [(0, 5), (13, 1), (30, 40)]
"""(history, new tokens) of the sequences that are written."""


@dataclass(frozen=True)
class Case:
    """One kind of model, on one device."""

    kind: Literal["attention", "write", "rows", "sample"]
    device: str
    dtype: DType = "bfloat16"
    head_dim: int = 128
    kv_heads: int = 8
    group: int = 4
    window: int | None = None
    soft_cap: float | None = None
    contexts: tuple[int, ...] = (1, 31, 32, 33, 500, 2048, 4097, 8192)
    new: tuple[int, ...] = (1, 17, 32, 1, 300, 2048, 77, 513)
    size: int = 4096
    block_bytes: int = 16 * 1024

    @property
    def name(self) -> str:
        if self.kind == "sample":
            return f"sample of {self.size:,}"
        if self.kind == "rows":
            return f"rows of {self.size:,} {self.dtype}"
        extras = "" if self.soft_cap is None else f", window {self.window}, soft cap"
        return f"{self.kind} {self.head_dim} {self.kv_heads} x {self.group} {self.dtype}{extras}"


def cases(context: Context) -> list[Case]:
    """Those that take longest to compile come first."""
    if context.tiny:
        small = Case(
            "attention", context.device, "float32", 64, 2, 2, contexts=(1, 23), new=(1, 9), block_bytes=4096
        )
        return [
            replace(small, dtype="bfloat16", head_dim=80, window=9, soft_cap=20.0),
            replace(small, kind="write"),
            replace(small, kind="rows", size=96),
            replace(small, kind="sample", size=300),
        ]
    model = Case("attention", "cuda")
    fancy = replace(model, window=1000, soft_cap=30.0)
    return [
        *(replace(fancy, head_dim=dim, kv_heads=2, group=4) for dim in (256, 128, 64)),
        *(replace(model, head_dim=dim, kv_heads=3, group=3) for dim in (256, 96, 80, 64)),
        model,
        replace(model, kv_heads=32, group=1, contexts=(1, 500, 2049), new=(1, 300, 700)),
        replace(model, dtype="float16"),
        replace(model, dtype="float32", kv_heads=2, contexts=(9, 700), new=(4, 300)),
        replace(model, kind="sample", size=128_256),
        replace(model, kind="sample", size=151_936),
        *(replace(model, kind="write", head_dim=dim, kv_heads=2) for dim in (64, 80, 128, 256)),
        replace(model, kind="write", dtype="float16"),
        *(replace(model, kind="rows", size=size) for size in (2560, 4096, 14_336)),
        replace(model, kind="rows", dtype="float32", size=576),
    ]


def run(context: Context) -> dict[str, Any]:
    """Cases by several processes: it is compiling that takes the time."""
    found: dict[str, Any] = {"cases": [], "failed": []}
    wanted = cases(context)
    context.keep(found, f"{len(wanted)} cases")
    for case, errors in side_by_side(context, check, wanted):
        if isinstance(errors, Exception):
            found["failed"].append({"case": case.name, "error": str(errors)})
        else:
            found["cases"].append({"case": case.name, **asdict(case), "errors": errors})
            found["failed"] += [
                {"case": case.name, "kernel": kernel, **error}
                for kernel, error in errors.items()
                if not error["error"] <= error["bound"]
            ]
        context.keep(found, case.name)
    done = {one["case"] for one in (*found["cases"], *found["failed"])}
    found["not_run"] = [case.name for case in wanted if case.name not in done]
    return found


Errors = dict[str, dict[str, float]]
How = tuple[float, int | None, float | None]


def check(case: Case) -> Errors:
    """By kernel: the largest error, and its bound."""
    checks: dict[str, Callable[[Case, torch.Generator], Errors]] = {
        "attention": _attention,
        "write": _write,
        "rows": _rows,
        "sample": _sample,
    }
    with torch.inference_mode():
        return checks[case.kind](case, torch.Generator(case.device).manual_seed(1))


def _layout(case: Case) -> KVLayout:
    return KVLayout(
        layers=1,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        block_bytes=case.block_bytes,
    )


def _error(got: Tensor, want: Tensor, bound: float, size: Tensor | None = None) -> dict[str, float]:
    """size: of what a value was computed from, if that is not the value's own. NaN is more than any bound."""
    error = (got.double() - want.double()).abs() / (want if size is None else size).double().abs().clamp(
        min=1
    )
    worst = float("nan") if got.shape != want.shape or error.isnan().any() else float(error.amax())
    return {"error": worst, "bound": bound}


def _randn(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    found = torch.randn(shape, generator=generator, device=case.device)
    return found.to(getattr(torch, case.dtype))


def _attention(case: Case, generator: torch.Generator) -> Errors:
    there = filled(_layout(case), list(case.contexts), generator)
    count, heads = len(case.contexts), case.kv_heads * case.group
    slots = torch.arange(count, device=case.device)
    lengths = torch.tensor(case.contexts, device=case.device)
    how: How = (float(case.head_dim**-0.5), case.window, case.soft_cap)
    query = _randn(case, generator, sum(case.new), heads, case.head_dim)
    one = query[:count].contiguous()
    decoded = decode_attention(there.cache, 0, slots, lengths, one, *how, longest=max(case.contexts))
    starts = torch.tensor([0, *case.new], device=case.device).cumsum(0)
    prefilled = prefill_attention(there.cache, 0, slots, starts, lengths, query, *how)

    def dense(parts: Sequence[Tensor]) -> Tensor:
        trios = zip(parts, there.keys, there.values, strict=True)
        return torch.cat([dense_attention(part, keys, values, *how) for part, keys, values in trios])

    bound = BOUND[case.dtype]
    return {
        "decode": _error(decoded, dense(torch.split(one, 1)), bound),
        "prefill": _error(prefilled, dense(torch.split(query, list(case.new))), bound),
    }


def _write(case: Case, generator: torch.Generator) -> Errors:
    """With and without norms; where there is none, bit for bit but for float32."""
    heads, count = case.kv_heads * case.group, sum(new for _, new in PIECES)
    qkv = _randn(case, generator, count, heads + 2 * case.kv_heads, case.head_dim)
    weights = 0.5 + torch.rand(2, case.head_dim, generator=generator, device=case.device)
    errors = {}
    for name, norm in (
        ("write", None),
        ("write normed", QKNorm(weights[0], weights[1], 1e-6, False)),
        ("write normed late", QKNorm(weights[0], weights[1], 1e-6, True)),
    ):
        ours, theirs = (_empty_cache(case) for _ in range(2))
        batch = _batch(case)
        frequencies = 10_000.0 ** (-torch.arange(case.head_dim // 2, device=case.device) * 2 / case.head_dim)
        dtype = getattr(torch, case.dtype)
        turned = angles(batch.positions, frequencies, 1.0, dtype)
        got = write_qkv(ours, 0, batch.token_slots, batch.positions, qkv, heads, turned, norm)
        want = ReferenceKernels().write(theirs, 0, batch, qkv, heads, turned, norm)
        bound = 0.0 if norm is None and case.dtype != "float32" else ULP[case.dtype]
        errors[name] = _error(_all(got, ours), _all(want, theirs), bound)
        own = ReferenceKernels().angles(batch.positions, frequencies, 1.0, dtype)
        errors["angles"] = _error(torch.stack(turned), torch.stack(own), ULP[case.dtype])
    return errors


def _all(query: Tensor, cache: KVCache) -> Tensor:
    """What is given and what is written, in one tensor."""
    return torch.cat([query.flatten(), cache.blocks.flatten()])


def _empty_cache(case: Case) -> KVCache:
    """Zeros, so that what is written where nothing should be shows."""
    layout = _layout(case)
    spans = layout.spans(max(history + new for history, new in PIECES))
    blocks = len(PIECES) * case.kv_heads * spans
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).int()
    shape = (1, len(PIECES), case.kv_heads, spans)
    arena = torch.zeros(blocks * layout.block_bytes, dtype=torch.uint8, device=case.device)
    return KVCache.over(arena, table.view(shape).to(case.device), layout)


def _batch(case: Case) -> RaggedBatch:
    device = case.device
    history = torch.tensor([h for h, _ in PIECES])
    new = torch.tensor([n for _, n in PIECES])
    positions = torch.cat([torch.arange(h, h + n) for h, n in PIECES])
    return RaggedBatch(
        slots=torch.arange(len(PIECES), device=device),
        query_starts=torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).to(device),
        context_lengths=(history + new).to(device),
        positions=positions.to(device),
        token_slots=torch.arange(len(PIECES)).repeat_interleave(new).to(device),
        max_query=int(new.max()),
        max_context=int((history + new).max()),
    )


def _rows(case: Case, generator: torch.Generator) -> Errors:
    reference, bound = ReferenceKernels(), ULP[case.dtype]
    weights = 0.5 + torch.rand(2, case.size, generator=generator, device=case.device)
    errors: Errors = {}
    for late in (False, True):
        norm, before = (Norm(weight, 1e-5, late) for weight in weights)
        x, stream = (_randn(case, generator, 33, case.size) for _ in range(2))
        name = "norm late" if late else "norm"
        errors[name] = _error(rms_norm(x, norm), reference.norm(x, norm), 2 * bound)
        for extra, first in (("add", None), ("before and add", before)):
            ours, theirs = stream.clone(), stream.clone()
            got, want = add_rms_norm(x, ours, norm, first), reference.add_norm(x, theirs, norm, first)
            # What is normed before may round the other way, then the sum with it, and then its norm.
            loose = (2 if first is None else 8) * bound
            errors[f"{extra} {name}, sum"] = _error(ours, theirs, 0.0 if first is None else loose)
            errors[f"{extra} {name}"] = _error(got, want, loose)
    gate_up = 3 * _randn(case, generator, 33, 2 * case.size)
    gate, up = gate_up.chunk(2, 1)
    activations: tuple[Literal["silu", "gelu_tanh"], ...] = ("silu", "gelu_tanh")
    for activation in activations:
        got, want = gate_mul(gate_up, activation), reference.gate(gate_up, activation)
        errors[activation] = _error(got, want, 2 * bound, gate * up)
    return errors


def _sample(case: Case, generator: torch.Generator) -> Errors:
    """error: the part of rows, of all kinds, whose token is not the one that the host's sampler draws."""
    rows = [
        Sampling(temperature=t, top_p=p, top_k=k, min_p=m, seed=seed, repetition_penalty=r, prompt_length=4)
        for seed, (t, p, k, m, r) in enumerate(
            [
                (0.0, 1.0, 0, 0.0, 1.0),
                (1.0, 1.0, 0, 0.0, 1.0),
                (0.7, 0.9, 0, 0.0, 1.2),
                (1.3, 1.0, 50, 0.0, 1.0),
                (0.8, 0.95, 40, 0.02, 1.1),
                (2.0, 0.999, 0, 0.0, 1.0),
            ]
            * (8 if case.size > 1000 else 1)
        )
    ]
    count = len(rows)
    logits = 4 * torch.randn(count, case.size, generator=generator, device=case.device)
    tokens = torch.randint(0, case.size, (count, 16), dtype=torch.int32)
    at = torch.full((count,), 12, dtype=torch.int64)
    args: dict[str, Any] = {"slots": range(count), "limits": [99] * count}
    here = SamplingBatch.build(rows, **args)
    there = SamplingBatch.build(rows, **args, device=case.device)
    got = sample(logits, there, at.to(case.device), tokens.to(case.device)).tokens.cpu()
    want = sample_on_host(logits.cpu(), here, at, tokens).tokens
    # The last bit of exp may move a sum across the random number; of this many rows, hardly ever.
    return {"sample": {"error": float((got != want).double().mean()), "bound": 0.05}}
