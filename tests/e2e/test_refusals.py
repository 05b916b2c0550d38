"""Bad input gets its status and the name of the field, and changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from muxserve.client import Client, InvalidRequest, MuxServeError, NotFound
from muxserve.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import MUXSERVE, Cluster


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": ""}),
        ("max_tokens", {"max_tokens": 100_000}),
        ("sampling.temperature", {"temperature": -0.1}),
        ("sampling.top_p", {"top_p": 0.0}),
        ("sampling.top_p", {"top_p": 2.0}),
        ("stop", {"stop": ["x"] * 10_001}),
    ],
)
def test_a_bad_field_is_named(client: Client, field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("a", **{"prompt": "hi", "max_tokens": 4, **arguments})
    assert caught.value.field == field
    assert caught.value.request_id


def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound, match="nosuch") as caught:
        client.generate("nosuch", "hi")
    assert caught.value.field == "model"


def test_a_50_mb_message_is_refused(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.gateway, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(model="a", prompt="x" * 50_000_000)
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_refusals_leave_nothing_behind_and_the_service_goes_on(cluster: Cluster, client: Client) -> None:
    for _ in range(50):
        with pytest.raises(MuxServeError):
            client.generate("a", "hi", top_p=2.0)
    assert client.generate("a", "hi", max_tokens=4).usage.completion_tokens > 0
    cluster.wait_idle()


def refused(*arguments: str, folder: Path, code: int = 1) -> str:
    """Run `muxserve up` with bad input; returns what it printed."""
    command = [
        MUXSERVE,
        "up",
        *arguments,
        "--port",
        "0",
        "--admin-port",
        "0",
        "--run-dir",
        str(folder / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_up_refuses_a_model_that_does_not_fit(tmp_path: Path, smollm2: Path) -> None:
    assert "arena" in refused("--model", f"big={smollm2}", "--arena", "1MiB", folder=tmp_path)


def test_up_refuses_a_truncated_gguf(tmp_path: Path, smollm2: Path) -> None:
    stump = tmp_path / "stump.gguf"
    with smollm2.open("rb") as source, stump.open("wb") as target:
        target.write(source.read(50_000_000))
    output = refused("--model", f"stump={stump}", folder=tmp_path)
    assert "stump" in output and "truncated" in output


def test_up_refuses_a_directory_without_config(tmp_path: Path, tiny: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "config.json").unlink()
    assert "config.json" in refused("--model", f"broken={broken}", folder=tmp_path)


def test_up_refuses_a_broken_config_file(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(json.dumps({"models": [{"name": "a", "path": "x", "dtipe": "float32"}]}))
    assert "dtipe" in refused("--config", str(config), folder=tmp_path, code=2)
    config.write_text("models: [")
    assert "cluster.yaml" in refused("--config", str(config), folder=tmp_path, code=2)
