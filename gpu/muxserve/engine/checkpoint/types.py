"""What a caller may ask of a checkpoint."""

from __future__ import annotations

from typing import Literal

RequestedDType = Literal["auto", "float32", "bfloat16"]
