"""Which processes a deployment has, and with which settings."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from muxserve.cli.deployment import PORTS, Deployment, PortTaken, ProcessSpec, plan
from muxserve.cli.run_directory import DirectoryInUse, RunDirectory
from muxserve.common.config import DeploymentConfig


def planned(**settings: Any) -> Deployment:
    config = DeploymentConfig(models=[{"name": "a", "path": "/m"}], port=0, admin_port=0, **settings)
    return plan(config, Path("/run/redis"), Path("/bin/valkey-server"))


def settings_of(process: ProcessSpec) -> dict[str, Any]:
    flags = [process.command[i + 1] for i, part in enumerate(process.command) if part == "--set"]
    return {key: yaml.safe_load(value) for key, _, value in (flag.partition("=") for flag in flags)}


def process_of(deployment: Deployment, name: str) -> ProcessSpec:
    return next(process for process in deployment.processes if process.name == name)


def test_every_process_has_a_port_of_its_own_and_knows_its_redis() -> None:
    deployment = planned(workers=2)
    addresses = {process.name: process.address for process in deployment.processes}
    assert list(addresses) == ["redis", "placement-0", "scheduler-0", "gateway-0", "worker-0", "worker-1"]
    assert len(set(addresses.values())) == 6
    assert all(int(address.rsplit(":", 1)[1]) in PORTS for address in addresses.values())
    for name in list(addresses)[1:]:
        settings = settings_of(process_of(deployment, name))
        assert settings["id"] == name
        assert settings["bind"] == addresses[name]
        assert settings["redis_url"] == f"redis://{addresses['redis']}/0"


def test_redis_writes_every_change_to_disk_and_listens_on_loopback() -> None:
    command = " ".join(process_of(planned(), "redis").command)
    for part in ("--appendonly yes", "--appendfsync always", "--bind 127.0.0.1", "--dir /run/redis"):
        assert part in command


def test_models_and_the_number_of_workers_are_told_to_placement() -> None:
    settings = settings_of(process_of(planned(workers=3), "placement-0"))
    assert settings["workers"] == 3
    assert [(model["name"], model["path"]) for model in settings["models"]] == [("a", "/m")]


@pytest.mark.parametrize(("cores", "workers", "shares"), [(8, 2, [4, 4]), (5, 3, [2, 2, 1]), (1, 2, [1, 1])])
def test_cores_are_split_over_the_workers(cores: int, workers: int, shares: list[int]) -> None:
    deployment = planned(cores=cores, workers=workers)
    found = [settings_of(process_of(deployment, f"worker-{i}"))["cores"] for i in range(workers)]
    assert found == shares


def test_a_worker_keeps_its_defaults_where_nothing_is_said() -> None:
    settings = settings_of(process_of(planned(arena="1GiB"), "worker-0"))
    assert settings["arena"] == 2**30
    assert not {"cores", "block_bytes", "weight_budget"} & settings.keys()


def test_settings_of_a_kind_win() -> None:
    deployment = planned(workers=2, settings={"worker": {"slots": 7, "arena": 5}})
    for name in ("worker-0", "worker-1"):
        settings = settings_of(process_of(deployment, name))
        assert (settings["slots"], settings["arena"]) == (7, 5)
    assert "slots" not in settings_of(process_of(deployment, "gateway-0"))


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = DeploymentConfig(models=[{"name": "a", "path": "/m"}], port=port, admin_port=0)
        with pytest.raises(PortTaken, match=str(port)):
            plan(config, Path("/run/redis"), Path("/bin/valkey-server"))


def test_stopping_takes_at_most_ten_seconds() -> None:
    stages: dict[int, float] = {}
    for process in planned(workers=4).processes:
        stages[process.stop_stage] = max(stages.get(process.stop_stage, 0.0), process.stop_grace)
    assert sum(stages.values()) < 10
    assert sorted(stages) == [
        process_of(planned(), name).stop_stage for name in ("gateway-0", "scheduler-0", "worker-0", "redis")
    ]


def test_a_run_directory_has_one_owner_and_starts_clean(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    with pytest.raises(DirectoryInUse):
        RunDirectory(tmp_path / "run")
    (first.redis / "appendonly.aof").write_text("prompts")
    (first.logs / "worker-0.log").write_text("old")
    first.close()
    assert (first.logs / "worker-0.log").exists() and not first.redis.exists()
    second = RunDirectory(tmp_path / "run")
    assert not list(second.redis.iterdir()) and not list(second.logs.iterdir())
    second.close()


def test_a_new_run_is_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [RunDirectory(None) for _ in range(2)]
    assert runs[0].path != runs[1].path
    assert (tmp_path / ".muxserve" / "latest").resolve() == runs[1].path
    for run in runs:
        run.close()
