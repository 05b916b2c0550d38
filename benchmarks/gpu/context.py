"""`Context`: what a section is given, and how it hands over what it finds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _nothing(doing: str) -> None:
    """A function of a module can be sent to another process."""


@dataclass(frozen=True, slots=True)
class Context:
    """device: "cuda" or "cpu". tiny: the same code on shapes of a few hundred elements, so that no fault of
    it waits for a GPU. earlier: what the sections before this one found, by name. ends: when to stop, by
    `time.monotonic`. part: what has been found so far is written there; None = nowhere."""

    device: str
    tiny: bool
    ends: float
    earlier: dict[str, Any] = field(default_factory=dict)
    part: Path | None = None
    say: Callable[[str], None] = _nothing

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.device, 0) if self.device == "cuda" else torch.device("cpu")

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds for what is still to be measured."""
        return self.ends - time.monotonic()

    def enough(self, seconds: float) -> bool:
        """Whether something that takes so long may begin."""
        return self.left() > seconds

    def keep(self, found: dict[str, Any], doing: str = "") -> None:
        """Write what there is, and what comes next: it outlives this process."""
        if doing:
            self.say(doing)
        if self.part is not None:
            write_json(self.part, {"found": found, "doing": doing})

    def ceiling(self, name: str) -> float:
        """Of the environment section; NaN if that was not run."""
        ceilings = self.earlier.get("environment", {}).get("ceilings", {})
        return float(ceilings.get(name, math.nan))


def write_json(path: Path, value: object) -> None:
    """All of it or nothing: whoever reads at that moment finds what was there before."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(_finite(value), indent=1) + "\n")
    fresh.replace(path)


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
