"""A deployment on one machine, as `muxserve up` reads it from flags, environment and a YAML file.

models:
  - {name: chat, path: models/chat.gguf, dtype: bfloat16}
  - {name: code, path: models/code, rate: 2.5}
arena: 2GiB
cores: 8
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from muxserve.common.settings import (
    ENV_PREFIX,
    Bytes,
    Problem,
    SettingsError,
    parse_assignments,
    read_settings,
)
from muxserve.v1 import common_pb2


class ModelEntry(BaseModel):
    """A model to serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._/:-]+$")
    """Name in requests, unique."""
    path: str = Field(min_length=1)
    """Hugging Face directory or GGUF file, as gateway and workers see it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and KV. "auto": the checkpoint's own; bfloat16 for GGUF and float16."""
    quota_blocks: int = Field(0, ge=0)
    """Blocks that the model may hold without borrowing. 0: a share computed by the scheduler."""
    rate: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Expected arrivals, requests per second: weighs the initial quota. 0: unknown."""
    max_context: int = Field(0, ge=0, le=2**32 - 1)
    """Serve a shorter context than the checkpoint allows, in tokens. 0: the checkpoint's own."""
    ttft_target: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Seconds from a request's arrival in which its first token should come. 0: no target."""
    tpot_target: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Seconds between two tokens of a sequence that should not be exceeded on average. 0: no target."""
    pinned: bool = False
    """Whether its weights stay loaded, whoever needs the room and however long it idles."""
    priority: int = Field(0, ge=-100, le=100)
    """Where room is needed, idle models of lower priority are put to sleep first."""
    keep_alive: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Seconds without a request after which it may be put to sleep though nobody needs the room. 0: never."""
    min_resident: int = Field(0, ge=0, le=64)
    """Replicas of it that stay loaded; at most one on each worker. 0: none has to."""

    def to_proto(self) -> common_pb2.ModelConfig:
        """As in RPCs and in the placement document."""
        fields = self.model_dump()
        return common_pb2.ModelConfig(residency_priority=fields.pop("priority"), **fields)


def _check_models(models: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
    if not models:
        raise ValueError("at least one model is required")
    names = [model.name for model in models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'two models named "{repeated[0]}"')
    return models


Models = Annotated[tuple[ModelEntry, ...], AfterValidator(_check_models)]
"""Models, at least one, with unique names."""

PolicyName = Literal["mux", "adbs", "fcfs", "round_robin", "temporal", "spatial"]
ServiceKind = Literal["gateway", "placement", "scheduler", "worker"]


class DeploymentConfig(BaseSettings):
    """All services on one machine."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    models: Models = Field((), validate_default=True)
    """What to serve, at least one. Relative paths in a file are relative to the file."""
    arena: Bytes = Field(512 * 2**20, validate_default=True)
    """Size of each worker's arena of KV blocks."""
    block_bytes: Bytes | None = None
    """Size of a block. Absent: the worker's default."""
    cores: int | None = Field(None, ge=1)
    """Cores to compute with, split evenly over the workers. Absent: all that this process may use."""
    workers: int = Field(1, ge=1, le=64)
    """Worker processes, each with an arena of its own."""
    weight_budget: Bytes | None = None
    """Bytes that weights may take on each worker. Absent: the worker's default."""
    policy: PolicyName = "mux"
    """How the scheduler shares a unit among its models."""
    port: int = Field(8600, ge=0, le=65535)
    """Port of the gateway; 0 is any free one."""
    admin_port: int = Field(8601, ge=0, le=65535)
    """Port of the placement service (AdminService); 0 is any free one."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address on which gateway and placement listen."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that services log."""
    settings: dict[ServiceKind, dict[str, Any]] = Field(default_factory=dict)
    """Further settings by kind of service, for example {worker: {slots: 128}}. They win over those above."""


def _flag(setting: str) -> str:
    """The flag of `muxserve up` for a setting."""
    return {"models": "--model", "settings": "--set"}.get(setting, "--" + setting.replace("_", "-"))


def read_deployment(flags: dict[str, Any], file: Path | None) -> DeploymentConfig:
    """The deployment from flags, environment and `file`; model paths are absolute and exist.

    Raises SettingsError.
    """
    config = read_settings(DeploymentConfig, flags, file, _flag)
    base = file.parent if file and "models" not in flags else Path()
    models = tuple(
        model.model_copy(update={"path": str((base / Path(model.path).expanduser()).absolute())})
        for model in config.models
    )
    problems = [
        Problem(f"models.{index}.path", f'model "{model.name}": no such file or directory: {model.path}', "")
        for index, model in enumerate(models)
        if not Path(model.path).exists()
    ]
    problems += [
        Problem(
            f"models.{index}.min_resident",
            f'model "{model.name}": {model.min_resident} replicas need as many workers; workers is'
            f" {config.workers}",
            "",
        )
        for index, model in enumerate(models)
        if model.min_resident > config.workers
    ]
    if problems:
        raise SettingsError(problems)
    return config.model_copy(update={"models": models})


def parse_service_settings(flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["worker.slots=128"]` as raw values for `DeploymentConfig.settings`. Raises SettingsError."""
    settings: dict[str, dict[str, Any]] = {}
    for path, value in parse_assignments(flags).items():
        kind, dot, key = path.partition(".")
        if not (dot and key):
            raise SettingsError([Problem(path, "expected KIND.KEY=VALUE", "--set")])
        settings.setdefault(kind, {})[key] = value
    return settings


_OPTIONS = tuple(name for name in ModelEntry.model_fields if name not in ("name", "path"))


def parse_models(flags: Sequence[str]) -> list[dict[str, str]]:
    """`NAME=PATH[,option=value...]` of each `--model` flag, as raw values for `DeploymentConfig.models`.

    Options are those of ModelEntry; a comma that no option follows belongs to the path. Raises SettingsError.
    """
    return [_parse_model(flag) for flag in flags]


def _parse_model(flag: str) -> dict[str, str]:
    name, equals, rest = flag.partition("=")
    if not (equals and name and rest):
        raise SettingsError(
            [Problem("model", f"expected NAME=PATH[,option=value...], got {flag!r}", "--model")]
        )
    options: dict[str, str] = {}
    while "," in rest:
        head, _, tail = rest.rpartition(",")
        option, equals, value = tail.partition("=")
        if equals and option.isidentifier() and option not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            reason = f'no option "{option}" for model "{name}" (there are {known})'
            raise SettingsError([Problem(f"model.{option}", reason, "--model")])
        if option not in _OPTIONS:
            break
        options.setdefault(option, value)
        rest = head
    return {"name": name, "path": rest, **options}
