"""How a process gets its settings: flags before MUXSERVE_* environment before a YAML file before defaults.

Each service derives its own class from `ServiceSettings` and builds it once, in its `__main__`:

    settings = load_settings(WorkerSettings)   # reads --config FILE and --set key=value from sys.argv
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ByteSize, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as EnvironmentValueError

ENV_PREFIX = "MUXSERVE_"

Bytes = Annotated[ByteSize, Field(gt=0)]
"""A number of bytes: an integer, or text such as "512MiB", "1.5 GiB", "16KB"."""

Location = tuple[str | int, ...]


class ServiceSettings(BaseSettings):
    """What every service needs to know."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    id: str = Field(min_length=1, max_length=128)
    """Name of this process in the registry: stable over restarts, unique among its kind."""
    bind: str = Field("127.0.0.1:0", pattern=r"^.+:\d+$")
    """host:port to listen on; port 0 is any free one."""
    advertise: str = ""
    """host:port under which others reach it. Empty: the address it is bound to."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Redis or Valkey that all services share."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""

    def advertised(self, bound: str) -> str:
        """The address to put in the registry, given the one that is bound."""
        if self.advertise:
            return self.advertise
        host, port = bound.rsplit(":", 1)
        return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]") else bound


@dataclass(frozen=True, slots=True)
class Problem:
    """One bad setting."""

    field: str
    """Dotted path of the setting, for example "models.0.dtype"; empty where the file as a whole is bad."""
    reason: str
    """What is wrong with it."""
    source: str
    """Where it came from: "deploy.yaml:12", "--arena", "environment MUXSERVE_ARENA"; empty if missing."""

    def __str__(self) -> str:
        # "--arena" and "environment MUXSERVE_ARENA" name the setting already.
        named = self.source.lower().replace("-", "_").endswith(self.field)
        return ": ".join(part for part in (self.source, "" if named else self.field, self.reason) if part)


class SettingsError(Exception):
    """Settings are bad; `str()` has one line per problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


S = TypeVar("S", bound=BaseSettings)


def load_settings(cls: type[S], argv: Sequence[str] | None = None) -> S:
    """Settings from the command line (`argv`, else the process's own), the environment and the file it names.

    Bad settings end the process with status 2 and one line per problem on stderr.
    """
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; VALUE is read as YAML"
    )
    flags = parser.parse_args(argv)
    try:
        return read_settings(cls, parse_assignments(flags.set), flags.config, "--set {}".format)
    except SettingsError as error:
        parser.exit(2, f"{error}\n")


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["cores=2", "arena=512MiB"]` as a dictionary. Raises SettingsError."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise SettingsError([Problem(key, "expected KEY=VALUE", "--set")])
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError([Problem(key, f"not a YAML value: {_one_line(error)}", "--set")]) from error
    return values


def read_settings(
    cls: type[S], flags: Mapping[str, Any], file: Path | None, flag_name: Callable[[str], str]
) -> S:
    """Settings of class `cls` from `flags`, the environment and `file`. Raises SettingsError.

    `flag_name` is what people call the flag of a setting.
    """
    in_file, tree = _read_yaml(file) if file else ({}, None)
    try:
        in_environment = EnvSettingsSource(cls)()
    except EnvironmentValueError as error:
        raise SettingsError([Problem("", _one_line(error), "environment")]) from error

    def problem(location: Location, reason: str) -> Problem:
        name = str(location[0]) if location else ""
        if name in flags:
            source = flag_name(name)
        elif name in in_environment:
            source = f"environment {ENV_PREFIX}{name.upper()}"
        elif file and tree is not None:
            line = _line_of(tree, location)
            source = f"{file}:{line}" if name in in_file or not name else ""
        else:
            source = ""
        return Problem(".".join(map(str, location)), reason, source)

    try:
        return cls(**{**in_file, **in_environment, **flags})
    except ValidationError as error:
        found = [problem(each["loc"], _reason(each)) for each in error.errors(include_url=False)]
        raise SettingsError(found) from error


def _reason(detail: Any) -> str:
    """What pydantic found, in one line, with the value where it helps."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return "unknown setting"
    if detail["type"] == "missing":
        return "required"
    value = repr(detail["input"])
    return message if detail["type"] == "value_error" or len(value) > 80 else f"{message}, got {value}"


def _read_yaml(file: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """The mapping in `file`, and its syntax tree (None: empty file). Raises SettingsError."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
        raise SettingsError([Problem("", f"cannot read the file: {reason}", str(file))]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        source = f"{file}:{mark.line + 1}" if mark else str(file)
        reason = getattr(error, "problem", None) or _one_line(error)
        raise SettingsError([Problem("", f"not YAML: {reason}", source)]) from error
    if values is None:
        return {}, None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SettingsError([Problem("", "expected a mapping of settings to values", str(file))])
    return values, tree


def _line_of(node: yaml.Node, location: Location) -> int:
    """Line, from 1, of the deepest part of `location` that the tree has."""
    line = node.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            match = [(key, value) for key, value in node.value if key.value == str(part)]
            if not match:
                break
            line, node = match[0][0].start_mark.line, match[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
    return int(line) + 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
