"""A deployment from flags and YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muxserve.common.config import DeploymentConfig, parse_models, parse_service_settings, read_deployment
from muxserve.common.settings import SettingsError


def from_yaml(folder: Path, text: str, flags: dict[str, Any] | None = None) -> DeploymentConfig:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return read_deployment(flags or {}, file)


def test_a_model_flag_has_a_name_a_path_and_options() -> None:
    assert parse_models(["a=/m/x.gguf", "b=models/y,dtype=float32,rate=2.5"]) == [
        {"name": "a", "path": "/m/x.gguf"},
        {"name": "b", "path": "models/y", "rate": "2.5", "dtype": "float32"},
    ]


def test_how_a_model_stays_loaded_is_said_in_a_flag_or_a_file_and_reaches_the_services(
    tmp_path: Path,
) -> None:
    (tmp_path / "m").touch()
    flags = parse_models([f"a={tmp_path / 'm'},pinned=true,priority=-3,keep_alive=2.5,min_resident=1"])
    text = "models: [{name: a, path: m, pinned: true, priority: -3, keep_alive: 2.5, min_resident: 1}]"
    configs = [from_yaml(tmp_path, text), read_deployment({"models": flags}, None)]
    for (model,) in (config.models for config in configs):
        proto = model.to_proto()
        assert (proto.pinned, proto.residency_priority) == (True, -3)
        assert (proto.keep_alive, proto.min_resident) == (2.5, 1)


def test_commas_and_equal_signs_that_are_no_options_belong_to_the_path() -> None:
    assert parse_models(["a=/m/x,y/z=1.gguf"]) == [{"name": "a", "path": "/m/x,y/z=1.gguf"}]


@pytest.mark.parametrize("flag", ["a", "a=", "=path", "a=/x,nonsense=1"])
def test_a_bad_model_flag_is_named(flag: str) -> None:
    with pytest.raises(SettingsError, match="--model"):
        parse_models([flag])


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "m").touch()
    (tmp_path / "n").touch()
    monkeypatch.chdir(tmp_path)
    text = "models: [{name: a, path: m}]\narena: 1GiB"
    config = from_yaml(tmp_path / "etc", text)
    assert [model.path for model in config.models] == [str(tmp_path / "etc" / "m")]
    config = from_yaml(tmp_path / "etc", text, {"models": [{"name": "b", "path": "n"}]})
    assert [(model.name, model.path) for model in config.models] == [("b", str(tmp_path / "n"))]
    assert config.arena == 2**30


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arena: 1GiB", "models: at least one"),
        ("models: [{name: a, path: m}, {name: a, path: m}]", 'two models named "a"'),
        (
            "models:\n- name: a\n  path: m\n  dtipe: float32",
            r"cluster.yaml:4: models.0.dtipe: unknown setting",
        ),
        ("models:\n- name: a b\n  path: m", r"cluster.yaml:2: models.0.name"),
        ("models:\n- {name: a, path: m}\n- {name: b}", r"models.1.path: required"),
        ("models: [{name: a, path: m, rate: .nan}]", "models.0.rate"),
        ("models: [{name: a, path: m, pinned: 3}]", "models.0.pinned"),
        ("models: [{name: a, path: m, priority: 101}]", "models.0.priority"),
        ("models: [{name: a, path: m, priority: high}]", "models.0.priority"),
        ("models:\n- {name: a, path: m}\n- {name: b, path: m, keep_alive: -1}", "models.1.keep_alive"),
        ("models: [{name: a, path: m, keep_alive: .inf}]", "models.0.keep_alive"),
        ("models: [{name: a, path: m, min_resident: 2}]", "models.0.min_resident: .*workers is 1"),
        ("models: [{name: a, path: nosuch}]", r"models.0.path: .*no such file"),
        ("models: [{name: a, path: m}]\nport: 70000", r"cluster.yaml:2: port"),
        ("models: [{name: a, path: m}]\nsettings: {worcer: {slots: 1}}", r"cluster.yaml:2: settings.worcer"),
    ],
)
def test_what_is_wrong_is_said_with_field_and_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(SettingsError, match=says) as caught:
        from_yaml(tmp_path, text)
    assert len(caught.value.problems) == 1


def test_settings_of_services_come_by_kind() -> None:
    assert parse_service_settings(["worker.slots=128", "worker.cores=2", "gateway.id=g"]) == {
        "worker": {"slots": 128, "cores": 2},
        "gateway": {"id": "g"},
    }
    with pytest.raises(SettingsError, match="KIND"):
        parse_service_settings(["slots=1"])
