"""transformers' continuous batching on the shape of Llama-3-8B, and ours, by turns, on the same prompts.

Both have random weights, generate greedily, and stop at no token. Ours runs as an executor does: prompts in
prefill jobs, then one decode job. Theirs takes as many tokens to a batch, and runs with CUDA graphs and as it
is by itself: the better counts. The attention that it has without a download is torch's.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.environment import versions
from benchmarks.gpu.shapes import LLAMA_3_8B, TINY_SHAPES, Shape
from benchmarks.gpu.unit import Unit

PER_JOB = 8192
"""Tokens of a prefill job of ours."""
ROUNDS = 2


@dataclass(frozen=True)
class Workload:
    """Prompts of these lengths, each answered by `new` tokens."""

    name: str
    lengths: tuple[int, ...]
    new: int

    def prompts(self, vocabulary: int) -> list[list[int]]:
        chooser = np.random.default_rng(1)
        return [chooser.integers(3, vocabulary, length).tolist() for length in self.lengths]


def workloads(context: Context) -> list[Workload]:
    if context.tiny:
        return [Workload("tiny", (6, 3), 3)]
    ragged = np.random.default_rng(2).integers(64, 1024, 32).tolist()
    return [
        Workload("32 x 512, 128 new", (512,) * 32, 128),
        Workload("32 ragged, 128 new", tuple(ragged), 128),
    ]


def run(context: Context) -> dict[str, Any]:
    """What fails of theirs is told, and ours stands."""
    shape = TINY_SHAPES[1] if context.tiny else LLAMA_3_8B
    found: dict[str, Any] = {"transformers": versions()["transformers"], "shape": shape.name, "workloads": []}
    context.keep(found, "ours: weights")
    with Unit(context, (1 << 20) if context.tiny else (16 << 30)) as unit:
        unit.open("none")
        unit.add("m", shape, 64, 2048)
        context.keep(found, "theirs: weights")
        try:
            modes = _Theirs(context, shape).modes(context)
        except Exception:
            modes = {}
            found["their_error"] = traceback.format_exc()[-2000:]
        for workload in workloads(context):
            found["workloads"].append(one := {"name": workload.name, "new": workload.new, "seconds": {}})
            # One mode after another: what theirs keeps from run to run is for one.
            for name, theirs in modes.items() or [("", None)]:
                contenders: dict[str, Contender] = {"ours": lambda w: _ours(unit, w)}
                if theirs is not None:
                    contenders[name] = theirs
                _alternate(context, found, one, workload, contenders)
    context.keep(found)
    return found


Contender = Callable[[Workload], tuple[float, int]]
"""Seconds, and tokens generated."""


def _alternate(
    context: Context,
    found: dict[str, Any],
    one: dict[str, Any],
    workload: Workload,
    contenders: dict[str, Contender],
) -> None:
    """The first run of each, which compiles and captures, does not count."""
    failed: set[str] = set()
    for number in range(2 if context.tiny else 1 + ROUNDS):
        for name, contender in contenders.items():
            last = one["seconds"].get(name, [one.get("warm_up_s", {}).get(name, 0.0)])[-1]
            if name in failed or not context.enough(1.2 * last + 1):
                continue
            context.keep(found, f"{workload.name}: {name}")
            try:
                seconds, tokens = contender(workload)
            except Exception:
                failed.add(name)
                one.setdefault("errors", {})[name] = traceback.format_exc()[-2000:]
                continue
            if tokens != len(workload.lengths) * workload.new:
                one.setdefault("errors", {})[name] = f"{tokens} tokens"
                failed.add(name)
            elif number:
                one["seconds"].setdefault(name, []).append(seconds)
            else:
                one.setdefault("warm_up_s", {})[name] = seconds
    tokens = len(workload.lengths) * workload.new
    one["tokens_per_s"] = {name: tokens / min(each) for name, each in one["seconds"].items()}
    theirs = [rate for name, rate in one["tokens_per_s"].items() if name != "ours"]
    if theirs and "ours" in one["tokens_per_s"]:
        one["ours_over_theirs"] = one["tokens_per_s"]["ours"] / max(theirs)


def _ours(unit: Unit, workload: Workload) -> tuple[float, int]:
    """Prompts are in the token table, and blocks are placed, before the clock starts: a worker does that
    while something else computes."""
    model, count = unit.models["m"], 0
    prompts = workload.prompts(model.spec.vocab_size)
    slots = unit.place(model, [len(prompt) + workload.new for prompt in prompts])
    for slot, prompt in zip(slots, prompts, strict=True):
        model.tables.tokens[slot, : len(prompt)] = prompt

    def take(step: Any) -> None:
        nonlocal count
        count += len(step.tokens)

    try:
        begun = time.perf_counter()
        waiting = dict(zip(slots, map(len, prompts), strict=True))
        while waiting:
            job: dict[int, tuple[int, int]] = {}
            tokens = 0
            for slot, length in list(waiting.items()):
                if job and tokens + length > PER_JOB:
                    break
                job[slot] = (0, waiting.pop(slot))
                tokens += length
            unit.finish(unit.prefill(model, job), told=take)
        rows = {slot: len(prompt) + 1 for slot, prompt in zip(slots, prompts, strict=True)}
        unit.finish(unit.decode(model, rows, workload.new - 1), told=take)
        return time.perf_counter() - begun, count
    finally:
        unit.empty(model, slots)


class _Theirs:
    """A model of theirs, in this process."""

    def __init__(self, context: Context, shape: Shape) -> None:
        import transformers

        library: Any = transformers
        spec = shape.spec
        config = library.LlamaConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=len(spec.layers),
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=8192,
            rms_norm_eps=spec.rms_eps,
            tie_word_embeddings=spec.tie_embeddings,
            eos_token_id=None,
        )
        with context.torch_device:
            self._model: Any = library.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa"
            ).eval()
        self._library, self._tiny = library, context.tiny
        self._vocabulary = spec.vocab_size
        self._kept = ("", "")

    def modes(self, context: Context) -> dict[str, Contender]:
        """Left alone, and with CUDA graphs."""
        found: dict[str, Contender] = {"theirs": lambda w: self._generate(w, "theirs", None)}
        if context.cuda:
            found["theirs, graphs"] = lambda w: self._generate(w, "theirs, graphs", True)
        return found

    def _generate(self, workload: Workload, mode: str, graphs: bool | None) -> tuple[float, int]:
        if self._kept != (mode, workload.name):  # what it keeps is sized for one workload
            self._model.destroy_cached_continuous_batching_manager()
            self._kept = (mode, workload.name)
        # Sized for the workload: what it would choose by itself depends on the memory that is free, and how
        # long its warm-up takes, and how wide its masks are, on that.
        blocks = sum(-(-(length + workload.new) // 256) for length in workload.lengths)
        size = {"num_blocks": 2 * blocks, "max_batch_tokens": 64 if self._tiny else PER_JOB}
        batching = self._library.ContinuousBatchingConfig(use_cuda_graph=graphs, **size)
        generation = self._library.GenerationConfig(
            max_new_tokens=workload.new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        prompts = workload.prompts(self._vocabulary)
        begun = time.perf_counter()
        outputs = self._model.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=batching,
            persistent_manager=True,
            progress_bar=False,
        )
        seconds = time.perf_counter() - begun
        errors = [output.error for output in outputs.values() if output.error]
        if errors:
            raise RuntimeError(str(errors[0]))
        return seconds, sum(len(output.generated_tokens) for output in outputs.values())
