"""`python -m muxserve.engine.loader --path P --dtype D --fd N`: fill weight memory from a file, and exit.

The memory is a memfd or, with `--handle H --device N` instead of `--fd`, another process's on a GPU.

A process of its own, so that what conversion takes (page cache mappings, scratch memory, seconds of the
interpreter) never weighs on the worker, and a file that turns bad while it is read harms nobody.

Exit 0: the memory holds the manifest's tensors. Exit 2, for the checkpoint, or 3, for the device: the last
line of stderr is a JSON object of `field` and `reason`. Other lines, where there is a cache:
`{"warning": …}`, and last `{"kept": …}`: whether the weights came from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muxserve.engine.weight_cache import Entry, WeightCache

if TYPE_CHECKING:
    from muxserve.engine.checkpoint import CheckpointError
    from muxserve.engine.cuda.runtime import CudaRuntime


def main(argv: Sequence[str] | None = None, runtime: CudaRuntime | None = None) -> int:
    """runtime: CuPy's if None."""
    parser = argparse.ArgumentParser(prog="muxserve.engine.loader", description=__doc__)
    parser.add_argument("--path", type=Path, required=True, help="model directory or GGUF file")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--layout", default="canonical", choices=("canonical", "panels"))
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument("--fd", type=int, help="the memfd, inherited, all zero")
    memory.add_argument("--handle", type=bytes.fromhex, help="cudaIpcMemHandle of the memory, in hexadecimal")
    parser.add_argument("--device", type=int, default=0, help="the GPU that the handle is for")
    parser.add_argument("--copy", type=int, help="with --handle: a memfd that holds, or is to get, the same")
    parser.add_argument("--copied", action="store_true", help="it holds them: the file is not read")
    parser.add_argument("--threads", type=int, default=2, help="threads that convert")
    parser.add_argument("--cache", type=Path, help="directory in which weights made from GGUF files are kept")
    parser.add_argument("--cache-limit", type=int, default=2**35, help="bytes of all files of the cache")
    arguments = parser.parse_args(argv)
    if arguments.handle is not None:
        return _fill_device(arguments, runtime)
    cache = entry = None
    if arguments.cache is not None and _is_gguf(arguments.path):
        cache = WeightCache(arguments.cache, arguments.cache_limit, lambda text: _say(warning=text))
        entry = cache.entry(arguments.path, arguments.dtype, arguments.layout)
    if cache and entry and cache.load(entry, arguments.fd, arguments.threads):
        _say(kept=True)
        return 0
    return _convert(arguments, cache, entry)


def _fill_device(arguments: argparse.Namespace, runtime: CudaRuntime | None) -> int:
    from muxserve.engine.checkpoint import CheckpointError, open_checkpoint
    from muxserve.engine.cuda.filling import HostCopy, fill
    from muxserve.engine.cuda.runtime import DeviceError
    from muxserve.engine.cuda.weights import DeviceWeights
    from muxserve.engine.weights import map_memory

    try:
        checkpoint = open_checkpoint(arguments.path, arguments.dtype)
        manifest = checkpoint.manifest()
        weights = DeviceWeights.attach(arguments.handle, manifest, arguments.device, runtime)
        try:
            copy = None
            if arguments.copy is not None:
                copy = HostCopy(map_memory(arguments.copy, checkpoint.weight_bytes()))
            if copy is not None and arguments.copied:
                fill(copy, weights.memory, arguments.threads)
            else:
                fill(checkpoint, weights.memory, arguments.threads, copy=copy)
        finally:
            weights.release()
    except (CheckpointError, OSError) as error:
        return _blame(error, arguments.path)
    except DeviceError as error:
        _say(field=error.field, reason=error.reason)
        return 3
    _say(kept=arguments.copied)
    return 0


def _convert(arguments: argparse.Namespace, cache: WeightCache | None, entry: Entry | None) -> int:
    # Imported here: it takes longer than to load a small model from the cache.
    from muxserve.engine.checkpoint import CheckpointError, fill, open_checkpoint

    try:
        checkpoint = open_checkpoint(arguments.path, arguments.dtype)
        fill(checkpoint, arguments.fd, arguments.threads, arguments.layout)
    except (CheckpointError, OSError) as error:
        return _blame(error, arguments.path)
    if cache and entry:
        cache.store(entry, arguments.fd, arguments.threads)
        _say(kept=False)
    return 0


def _blame(error: CheckpointError | OSError, path: Path) -> int:
    """Say what is wrong with the checkpoint; the exit code."""
    if isinstance(error, OSError):
        _say(field="path", reason=f"{path} cannot be loaded: {error}")
    else:
        _say(field=error.field, reason=error.reason)
    return 2


def _is_gguf(path: Path) -> bool:
    """Directories are not kept: safetensors are mapped, and need no more than packing."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def _say(**line: Any) -> None:
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
