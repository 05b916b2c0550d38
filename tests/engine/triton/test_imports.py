"""The kernels' modules import where there is neither a GPU nor Triton; launching says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import muxserve.engine.kernels.triton.kernels as kernels

PACKAGE = Path(kernels.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in {"__init__", "interpreting"})
SCRIPT = f"""
import importlib, importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch
for name in {MODULES}:
    importlib.import_module("muxserve.engine.kernels.triton." + name)
from muxserve.engine.kernels.triton.gates import gate_mul
try:
    gate_mul(torch.zeros(1, 4), "silu")
except ModuleNotFoundError as error:
    assert error.name == "triton" and "muxserve[cuda]" in str(error)
else:
    raise SystemExit("launched")
"""


def test_every_module_imports_without_triton_and_a_launch_names_it() -> None:
    assert len(MODULES) >= 10
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
