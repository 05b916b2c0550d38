"""vLLM's own OpenAI server for one model: `python -m benchmarks.multiplex.peers.vllm_server …`.

The environment is that of the peer in `benchmarks.engine`, its best mode here; the size of its KV cache is
given in bytes, which the environment could not say. Everything else is vLLM's default.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.engine.peers.vllm_peer import environment


def main() -> None:
    """Becomes the server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--tokenizer", required=True, help="directory")
    parser.add_argument("--name", required=True, help="name of the model in requests")
    parser.add_argument("--context", type=int, required=True, help="tokens of the longest sequence")
    parser.add_argument("--cores", type=int, nargs="+", required=True, help="to compute on")
    parser.add_argument("--cache-bytes", type=int, required=True, help="for KV")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    wanted = environment(options.cores, options.cache_bytes)
    del wanted["VLLM_CPU_KVCACHE_SPACE"]  # whole GiB, and it wins over the flag
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", options.model, "--tokenizer", options.tokenizer, "--dtype", "bfloat16"]
    command += ["--served-model-name", options.name, "--max-model-len", f"{options.context}"]
    command += ["--kv-cache-memory-bytes", f"{options.cache_bytes}"]
    command += ["--host", "127.0.0.1", "--port", f"{options.port}"]
    command += ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    os.execve(sys.executable, command, {**os.environ, **wanted})


if __name__ == "__main__":
    main()
