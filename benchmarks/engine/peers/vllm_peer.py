"""vLLM's offline engine as a contender: `python -m benchmarks.engine.peers.vllm_peer --model DIRECTORY …`.

What `LLM.generate` does, step by step, so that the moment of each token is known: `LLMEngine.add_request` for
every prompt, then `LLMEngine.step` until nothing is left. Text is not made of the tokens, no prompt's KV is
kept for another one. The engine runs in this process and, where Intel's OpenMP is installed beside vLLM,
with that, as its manual advises: both are faster on few cores than the defaults. Everything else is vLLM's
default.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.engine.peers.wire import Generate, Prompts, Stopwatch, Timing, serve


def environment(cores: list[int], cache_bytes: int) -> dict[str, str]:
    """What vLLM reads from its environment: it computes on `cores` and keeps KV in `cache_bytes`."""
    threads = ",".join(map(str, cores))
    library = _openmp()
    found = {
        "LD_PRELOAD": str(library),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": threads,
        "VLLM_CPU_KVCACHE_SPACE": str(-(-cache_bytes // 2**30)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM 0.32 cannot load what it has compiled ahead of time and would compile for a minute every time.
        "VLLM_USE_AOT_COMPILE": "0",
    }
    if library.name.startswith("libiomp"):
        # As vLLM sets them where it starts a process of its own to compute in.
        found["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{threads}]"
        found |= {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    else:
        found["GOMP_CPU_AFFINITY"] = threads
    return found


def _openmp() -> Path:
    """Intel's, or else torch's own, which vLLM preloads where it starts a process to compute in."""
    intel = Path(sys.prefix) / "lib" / "libiomp5.so"
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    return intel if intel.exists() else next((Path(torch.origin).parent / "lib").glob("libgomp*.so*"))


def start(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    """Loads the model."""
    import torch
    import vllm  # type: ignore[import-not-found, unused-ignore]
    from vllm.sampling_params import (  # type: ignore[import-not-found, unused-ignore]
        RequestOutputKind,
    )

    llm = vllm.LLM(
        model=options.model,
        dtype="bfloat16",
        max_model_len=options.context,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    engine = llm.llm_engine
    numbers = itertools.count()

    def generate(prompts: Prompts, new: int) -> Timing:
        sampling = vllm.SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        clock = Stopwatch(len(prompts))
        rows = {}
        for row, ids in enumerate(prompts):
            number = str(next(numbers))
            engine.add_request(number, {"prompt_token_ids": ids}, sampling.clone())
            rows[number] = row
        while engine.has_unfinished_requests():
            outputs = engine.step()
            clock.arrived([(rows[one.request_id], list(one.outputs[0].token_ids)) for one in outputs])
        return clock.timing(new)

    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    openmp = Path(os.environ["LD_PRELOAD"]).name
    return generate, {**versions, "threads": len(options.cores), "openmp": openmp}


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--context", type=int, required=True, help="tokens of the longest sequence")
    parser.add_argument("--cores", type=int, nargs="+", required=True, help="to compute on")
    parser.add_argument("--cache-bytes", type=int, required=True, help="for KV")
    options = parser.parse_args()
    wanted = environment(options.cores, options.cache_bytes)
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        # Libraries that are loaded early must find it: begin again with it.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})
    serve(lambda: start(options))


# vLLM may start processes that import this module again.
if __name__ == "__main__":
    main()
