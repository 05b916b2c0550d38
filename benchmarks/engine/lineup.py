"""Who takes part: our engine and its peers, each as a `Contender`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.engine.contender import Contender
from benchmarks.engine.plan import Plan

OURS = "muxserve"

PEER_MODULES = {"vllm": "vllm", "transformers": "transformers"}
"""Module that a peer's interpreter must have."""


class CannotRun(Exception):
    """A peer that was asked for cannot take part here; the message says what is missing."""


def cores() -> list[int]:
    """Those that every contender runs on."""
    return sorted(os.sched_getaffinity(0))


def ours(plan: Plan, model: Path, logs: Path, threads: int) -> Contender:
    """Our engine alone."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.engine.ours",
        "--model",
        f"{model}",
        "--threads",
        f"{threads}",
    ]
    command += ["--slots", f"{max(plan.slots, *plan.streams)}", "--context", f"{plan.context}"]
    tokens = max(plan.tokens, max(plan.streams) * (plan.stream_prompt + plan.stream_tokens))
    return Contender(OURS, [*command, "--tokens", f"{tokens}"], logs / "muxserve.log")


def peer(
    kind: str, python: str, threads: int, plan: Plan, model: Path, logs: Path, kv_token_bytes: int
) -> Contender:
    """A peer that computes with `threads` threads, loading already. `model`: a Hugging Face directory.

    A process for each number of threads: one that is told to change it decodes in vLLM at half the speed.
    """
    name = f"{kind}-{threads}t"
    command = [python, "-m", f"benchmarks.engine.peers.{kind}_peer", "--model", f"{model}"]
    if kind == "vllm":
        # vLLM gives KV in blocks, and refuses a cache that does not hold one longest sequence.
        room = (max(plan.peer_tokens, plan.peer_context) + 64 * plan.slots) * kv_token_bytes
        command += ["--context", f"{plan.peer_context}", "--cache-bytes", f"{room}"]
        command += ["--cores", *map(str, cores()[:threads])]
    else:
        command += ["--threads", f"{threads}"]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": f"{threads}", "TOKENIZERS_PARALLELISM": "false"}
    return Contender(name, command, logs / f"{name}.log", environment)


def check_peers(peers: Iterable[str], python: str) -> None:
    """Raises CannotRun if `python` has not what they need."""
    for kind in peers:
        module = PEER_MODULES[kind]
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        try:
            missing = subprocess.run((python, "-c", probe), check=False).returncode
        except OSError as error:
            raise CannotRun(f"--peer-python: {python} cannot be started: {error}") from error
        if missing:
            raise CannotRun(f"--peer {kind}: {python} has no {module}; name one that has it by --peer-python")


def peer_directory(model: Path, pythons: list[str]) -> Path:
    """The checkpoint as a Hugging Face directory: itself, or what transformers makes of a GGUF file in the
    first of these interpreters that can. Kept in the user's cache by content, since peers key what they
    compile by its path. Raises CannotRun."""
    if model.is_dir():
        return model
    with model.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muxserve" / "benchmarks"
    target = base / f"{model.stem}-{digest}"
    if target.exists():
        return target
    base.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).parent / "peers" / "convert.py"
    said = ""
    with TemporaryDirectory(dir=base) as scratch:
        made = Path(scratch) / "model"
        for python in dict.fromkeys(pythons):
            command = (python, f"{script}", f"{model}", f"{made}")
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.rename(target)
                return target
            shutil.rmtree(made, ignore_errors=True)
            said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    raise CannotRun(f"{model} was not converted for peers (transformers, accelerate, gguf needed): {said}")
