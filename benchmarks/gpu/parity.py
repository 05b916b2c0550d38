"""Small random models of every family: greedy text of the GPU runner beside the CPU engine's.

In float32, token for token. In bfloat16, where one rounding more or less may decide between two tokens, how
much of a text passes before the first difference. Where the CPU engine is not built, the reference decoder is
in its place (float32 only).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.side import side_by_side
from benchmarks.gpu.unit import Unit
from muxserve.engine.checkpoint import Checkpoint, open_checkpoint
from muxserve.engine.cuda.filling import fill
from muxserve.engine.messages import Step

Tokens = list[int]
CPU_ENGINE = "CPU engine"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")


@dataclass(frozen=True)
class Case:
    """One model; prompts of these lengths, computed in chunks, and `new` tokens of each."""

    context: Context
    family: str
    dtype: Literal["float32", "bfloat16"]
    prompts: tuple[int, ...]
    new: int
    chunk: int
    head_dim: int = 64


def cases(context: Context, reference: str) -> list[Case]:
    """What the reference can say something of."""
    plain = Context(context.device, context.tiny, context.ends)
    if context.tiny:
        return [Case(plain, "gemma3_text", "float32", (9, 1), 3, 6)]
    lengths = (1, 17, 64, 200, 333)
    found = [Case(plain, family, "float32", lengths, 48, 96) for family in FAMILIES]
    found.append(Case(plain, "qwen3", "float32", lengths, 48, 96, head_dim=128))
    if reference == CPU_ENGINE:
        found += [Case(plain, family, "bfloat16", lengths, 48, 96) for family in ("llama", "gemma3_text")]
    return found


def run(context: Context) -> dict[str, Any]:
    """Several at once: each compiles kernels of its own."""
    found: dict[str, Any] = {"reference": _reference(), "cases": [], "failed": []}
    wanted = cases(context, found["reference"])
    context.keep(found, f"{len(wanted)} models")
    for case, outcome in side_by_side(context, check, wanted):
        about = {"family": case.family, "dtype": case.dtype, "head_dim": case.head_dim}
        if isinstance(outcome, Exception):
            found["failed"].append({**about, "error": str(outcome)})
        else:
            found["cases"].append({**about, **outcome})
            if case.dtype == "float32" and outcome["equal"] < outcome["tokens"]:
                found["failed"].append({**about, **outcome})
        context.keep(found, f"{case.family} {case.dtype}")
    return found


def check(case: Case) -> dict[str, Any]:
    """Tokens in all, and how many of them come before the first difference of their text."""
    # A wide import, and of tests' helpers: only where it is needed.
    from tests.engine.model_factory import make_model

    torch.set_num_threads(2)
    np.seterr(all="ignore")
    with tempfile.TemporaryDirectory() as folder:
        window = 40 if case.family in ("mistral", "gemma3_text", "qwen2") else None
        path = make_model(
            case.family,  # type: ignore[arg-type]  # one of its families
            Path(folder),
            head_dim=case.head_dim,
            layers=2 if case.context.tiny else 3,
            window=window,
            context=512,
        )
        checkpoint = open_checkpoint(path, case.dtype)
        chooser = np.random.default_rng(1)
        prompts = [chooser.integers(3, checkpoint.spec.vocab_size, n).tolist() for n in case.prompts]
        want = _expected(checkpoint, prompts, case)
        got = _ours(case.context, checkpoint, prompts, case)
    equal = sum(_common(a, b) for a, b in zip(got, want, strict=True))
    return {"tokens": len(prompts) * case.new, "equal": equal}


def _common(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _reference() -> str:
    from muxserve.engine.cpu.library import load

    try:
        load()
    except (OSError, RuntimeError):
        return "reference decoder"
    return CPU_ENGINE


def _expected(checkpoint: Checkpoint, prompts: Sequence[Tokens], case: Case) -> list[Tokens]:
    if _reference() == CPU_ENGINE:
        from tests.engine.cpu import CpuEngine

        most = max(case.prompts) + case.new
        with CpuEngine(checkpoint, slots=len(prompts), context=most) as engine:
            return engine.generate(prompts, case.new, chunk=case.chunk)
    return [_by_reference(checkpoint, prompt, case.new) for prompt in prompts]


def _by_reference(checkpoint: Checkpoint, prompt: Tokens, new: int) -> Tokens:
    from muxserve.engine.kernels.reference import ReferenceKernels
    from muxserve.engine.models.decoder import Decoder
    from tests.engine.greedy import make_cache, ragged

    tensors = {name: torch.from_numpy(array.copy()) for name, array in checkpoint.tensors()}
    decoder = Decoder(checkpoint.spec, tensors, ReferenceKernels())
    cache = make_cache(checkpoint, 1, len(prompt) + new, 4096)
    text, begin = list(prompt), 0
    for _ in range(new):
        batch = ragged([0], [begin], [len(text)])
        hidden = decoder.forward(torch.tensor(text[begin:]), batch, cache)
        begin = len(text)
        text.append(int(decoder.logits(hidden[-1:]).argmax()))
    return text[len(prompt) :]


def _ours(context: Context, checkpoint: Checkpoint, prompts: Sequence[Tokens], case: Case) -> list[Tokens]:
    """All prompts together, chunk by chunk, then all of them decode together: in two jobs, so that a graph
    goes on from another's tokens."""
    texts: dict[int, Tokens] = {}

    def take(step: Step) -> None:
        for slot, token in zip(step.slots, step.tokens, strict=True):
            texts.setdefault(slot, []).append(token)

    with Unit(context, 64 << 20 if context.cuda else 4 << 20, 4096) as unit:
        unit.open("none")
        most = max(case.prompts) + case.new
        model = unit.add_filled(
            "m",
            checkpoint.spec,
            checkpoint.manifest(),
            lambda weights: fill(checkpoint, weights.memory, threads=1),
            len(prompts),
            most,
        )
        slots = unit.place(model, [len(prompt) + case.new for prompt in prompts])
        for slot, prompt in zip(slots, prompts, strict=True):
            model.tables.tokens[slot, : len(prompt)] = prompt
        ends = {slot: len(prompt) for slot, prompt in zip(slots, prompts, strict=True)}
        for begin in range(0, max(case.prompts), case.chunk):
            reached = begin + case.chunk
            pieces = {slot: (begin, min(reached, end)) for slot, end in ends.items() if begin < end}
            last = {slot for slot, end in ends.items() if end <= reached}
            job = unit.prefill(model, pieces, sampled=last.__contains__)
            unit.finish(job, told=take)
        done = 1
        while done < case.new:
            steps = min(case.new - done, 20)
            rows = {slot: end + done for slot, end in ends.items()}
            unit.finish(unit.decode(model, rows, steps), told=take)
            done += steps
        unit.shut()
        unit.empty(model, slots)
    return [texts[slot] for slot in slots]
