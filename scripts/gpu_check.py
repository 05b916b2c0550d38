"""Run the tests that need a GPU, or say why there is none and be content: `make gpu-check`.

Looks for a device through the driver itself: a GPU whose Python packages are missing is not taken for none.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys

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


def main() -> int:
    count, reason = device_count()
    if count == 0:
        print(f"no GPU: {reason}")
        return 0
    if importlib.util.find_spec("cupy") is None:
        print(f"{count} GPU(s), but CuPy is missing: pip install 'muxserve[cuda]'", file=sys.stderr)
        return 1
    print(f"{count} GPU(s)", flush=True)
    return subprocess.call([sys.executable, "-m", "pytest", "-m", "gpu", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
