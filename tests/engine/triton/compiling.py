"""Compiles kernels for a Hopper GPU without one, launch by launch, and says what they need.

For a process of its own, in which Triton does not interpret.
"""

# mypy: disable-error-code="method-assign"
from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel of a launch. registers: of a thread; spilled: bytes of stack and local memory of a thread;
    shared: bytes of a program; async_copies, wide_copies: cp.async instructions, and those of 16 bytes;
    wgmma, mma: matrix instructions of a warpgroup and of a warp."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    warps: int
    async_copies: int
    wide_copies: int
    wgmma: int
    mma: int
    ptx: str

    def figures(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "ptx"}


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Within, launches compile and do nothing else; what they made is in the list."""
    found: list[Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(_compile(self, args, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield found
    finally:
        JITFunction.run = original


def _compile(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    assert set(values) == set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        number = value.data_ptr() if hasattr(value, "data_ptr") else value
        if isinstance(number, int) and number % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(
        kernel.__name__,
        registers,
        spilled,
        made.metadata.shared,
        made.metadata.num_warps,
        len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        len(re.findall(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)),
        len(re.findall(r"wgmma\.mma_async", ptx)),
        len(re.findall(r"\bmma\.sync", ptx)),
        ptx,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack + local bytes) of a thread."""
    path = Path(os.environ["TRITON_CACHE_DIR"]) / f"{os.getpid()}.cubin"
    path.write_bytes(cubin)
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    path.unlink()
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.rpartition("Function")[2]))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
