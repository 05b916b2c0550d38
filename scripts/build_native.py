"""Compiles the CPU engine's library: `python scripts/build_native.py`, and the wheel's build hook.

The compiler is $CXX or the system's, or else clang out of the `ziglang` wheel, which needs nothing of the
system's. The library is built once for each instruction set, beside its sources; the engine picks one at
start. MUXSERVE_NATIVE=0 leaves it out: for a wheel of the SDK or of services that hold no model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("gpu/muxserve/engine/cpu/native")
ZIG = "ziglang==0.17.1"
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"),
)
X86 = {"avx512bf16": "x86-64-v4 avx512bf16", "avx2": "x86-64-v3", "generic": "x86-64-v2"}
"""Variant (muxserve.engine.cpu.library says which machine gets which) → what it may use."""


def compiler() -> list[str] | None:
    """Command of a C++ compiler of this system; None if there is none."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name.split()
    return None


def commands(folder: Path) -> dict[Path, list[str]]:
    """What makes which library."""
    found = compiler()
    base = found or [sys.executable, "-m", "ziglang", "c++", "-s"]  # unlike others it adds debug information
    source = str(folder / "engine.cpp")
    made = {}
    for variant, target in (X86 if platform.machine() == "x86_64" else {"generic": ""}).items():
        words = target.split()
        if found:
            march = [f"-march={words[0]}", *(f"-m{word}" for word in words[1:])] if words else []
            march += ["-static-libstdc++", "-static-libgcc"]
        else:
            march = ["-mcpu=" + "+".join([words[0].replace("-", "_"), *words[1:]])] if words else []
        out = folder / f"{variant}.so"
        made[out] = [*base, *FLAGS, *march, source, "-o", str(out)]
    return made


def build(root: Path) -> list[Path]:
    """Compile what is not there or was made from other sources or by other means; returns all libraries."""
    folder = root / FOLDER
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.[ch]*")))

    def one(out: Path, command: list[str]) -> None:
        stamp = out.with_suffix(".stamp")
        # The interpreter that runs zig is another one in each build of a wheel.
        words = "\0".join(command).replace(sys.executable, "python")
        digest = hashlib.sha256(sources + words.encode()).hexdigest()
        if out.exists() and stamp.exists() and stamp.read_text() == digest:
            return
        if compiler() is None and importlib.util.find_spec("ziglang") is None:
            raise SystemExit(f"no C++ compiler: install one, or `pip install {ZIG}`")
        made = out.with_suffix(f".{os.getpid()}")
        subprocess.run([*command[:-1], str(made)], check=True)
        made.replace(out)  # a process that runs keeps the file that it has mapped
        stamp.write_text(digest)

    wanted = commands(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda item: one(*item), wanted.items()):
            pass
    return list(wanted)


class NativeBuildHook(BuildHookInterface[Any]):
    """Puts the library into the wheel, and beside the sources of an editable install."""

    def dependencies(self) -> list[str]:
        return [] if compiler() or self._left_out() else [ZIG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self._left_out():
            return
        # They are git-ignored, and would be left out. What else lies there, or in a source archive, is.
        build_data["artifacts"] += [f"/{FOLDER}/{library.name}" for library in build(Path(self.root))]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"

    @staticmethod
    def _left_out() -> bool:
        return os.environ.get("MUXSERVE_NATIVE") == "0"


def _platform_tag() -> str:
    from packaging.tags import platform_tags  # comes with hatchling

    return next(platform_tags())


if __name__ == "__main__":
    build(Path(__file__).parents[1])
