"""Flags before environment before file before defaults; whatever is bad is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from muxserve.common.settings import (
    Bytes,
    ServiceSettings,
    SettingsError,
    load_settings,
    parse_assignments,
    read_settings,
)


class ExampleSettings(ServiceSettings):
    id: str = "example-0"
    cores: int = Field(4, ge=1)
    arena: Bytes = Field(512 * 2**20, validate_default=True)


def read(flags: dict[str, object], file: Path | None = None) -> ExampleSettings:
    return read_settings(ExampleSettings, flags, file, "--{}".format)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text("arena: 1GiB\ncores: 2\nlog_level: debug\n")
    return path


def test_flags_win_over_environment_over_file_over_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUXSERVE_CORES", "8")
    monkeypatch.setenv("MUXSERVE_LOG_LEVEL", "warning")
    settings = read({"log_level": "error"}, file)
    assert (settings.arena, settings.cores, settings.log_level) == (2**30, 8, "error")
    assert settings.bind == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), (4096, 4096), ("16KB", 16_000)]
)
def test_sizes_have_units(text: object, size: int) -> None:
    assert read({"arena": text}).arena == size


@pytest.mark.parametrize("text", ["0", "-5MiB", "many", "5 foo", None])
def test_a_bad_size_is_named_with_its_flag(text: object) -> None:
    with pytest.raises(SettingsError, match="--arena: "):
        read({"arena": text})


def test_a_bad_value_in_a_file_is_named_with_its_line(file: Path) -> None:
    file.write_text("id: x\ncores: many\nnonsense: 1\n")
    with pytest.raises(SettingsError) as caught:
        read({}, file)
    problems = {(problem.field, problem.source) for problem in caught.value.problems}
    assert problems == {("cores", f"{file}:2"), ("nonsense", f"{file}:3")}


def test_a_bad_value_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUXSERVE_CORES", "0")
    with pytest.raises(SettingsError, match=r"environment MUXSERVE_CORES: .*got '0'"):
        read({})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"cores: [", "not YAML"),
        (b"- 1\n- 2\n", "mapping"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"1: 2\n", "mapping"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=says) as caught:
        read({}, path)
    assert "broken.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nosuch\.yaml: cannot read the file"):
        read({}, tmp_path / "nosuch.yaml")


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.touch()
    assert read({}, path) == read({})


@given(st.binary(max_size=60))
def test_any_file_gives_settings_or_a_settings_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        read({}, path)
    except SettingsError as error:
        assert "any.yaml" in str(error)


def test_assignments_are_yaml() -> None:
    values = parse_assignments(["cores=2", 'models=[{"name": "a"}]', "id=a=b", "redis_url="])
    assert values == {"cores": 2, "models": [{"name": "a"}], "id": "a=b", "redis_url": None}
    for bad in ("cores", "=2", "cores=["):
        with pytest.raises(SettingsError):
            parse_assignments([bad])


def test_a_process_with_bad_settings_ends_with_2_and_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(ExampleSettings, ["--set", "cores=0", "--set", "nonsense=1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "--set cores: Input should be greater than or equal to 1, got 0",
        "--set nonsense: unknown setting",
    ]


def test_a_service_needs_no_more_than_flags(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "muxserve.placement", "--set", "models=[]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (2, "--set models: at least one model is required\n")


def test_a_wildcard_address_is_advertised_by_host_name() -> None:
    assert read({"advertise": "here:1"}).advertised("0.0.0.0:8600") == "here:1"
    assert read({}).advertised("127.0.0.1:8600") == "127.0.0.1:8600"
    host, port = read({}).advertised("0.0.0.0:8600").rsplit(":", 1)
    assert host not in ("", "0.0.0.0") and port == "8600"
