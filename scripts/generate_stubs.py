"""Generates the gRPC stubs under proto/muxserve/v1; with --check, says whether the committed ones are
current.

Run by `make stubs` and `make check`.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "proto"
PACKAGE = Path("muxserve/v1")


def generate(out: Path) -> None:
    """Write the stubs of every .proto below `out`."""
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / PACKAGE).glob("*.proto"))
    flags = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *flags, *protos]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def drift(out: Path) -> list[str]:
    """Names of stubs that differ from the committed ones, or exist on one side only."""
    fresh = {p.name for p in (out / PACKAGE).glob("*_pb2*")}
    kept = {p.name for p in (ROOT / PACKAGE).glob("*_pb2*")}
    same, *_ = filecmp.cmpfiles(out / PACKAGE, ROOT / PACKAGE, list(fresh & kept), shallow=False)
    return sorted((fresh | kept) - set(same))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = drift(Path(folder))
    if stale:
        print("stubs are not what the .proto files say; run `make stubs`:", *stale, sep="\n  ")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
