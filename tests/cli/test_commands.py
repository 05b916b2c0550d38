"""The commands that call a service, run as a user runs them, against a scripted peer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from muxserve.v1 import admin_pb2, common_pb2
from tests.client.peer import Peer, Server, answer, refusal

MUXSERVE = str(Path(sys.executable).with_name("muxserve"))
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def peer(server: Server) -> Peer:
    return server.peer


@pytest.fixture
def run(server: Server) -> Run:
    """Runs `muxserve ARGUMENTS` against the peer."""

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        address = server.address
        environment = {**os.environ, "MUXSERVE_ADDRESS": address, "MUXSERVE_ADMIN": address}
        return subprocess.run(
            [MUXSERVE, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
        )

    return run


def test_generate_prints_the_completion_and_nothing_else(run: Run, peer: Peer) -> None:
    done = run("generate", "-m", "a", "--max-tokens", "5", "--temperature", "0", "--seed", "7", "Say hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello world\n", "")
    (request,) = peer.requests
    assert (request.model, request.prompt, request.max_tokens) == ("a", "Say hello", 5)
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 7)
    assert not request.sampling.HasField("top_p")


def test_generate_reads_a_prompt_from_standard_input(run: Run, peer: Peer) -> None:
    assert run("generate", "-m", "a", "-", stdin="two\nlines").returncode == 0
    assert peer.requests[0].prompt == "two\nlines"


def test_generate_passes_every_option_on(run: Run, peer: Peer) -> None:
    options = (
        "--top-p",
        "0.5",
        "--top-k",
        "3",
        "--min-p",
        "0.1",
        "--stop",
        "x",
        "--stop",
        "y",
        "--ignore-eos",
    )
    assert run("generate", "-m", "a", *options, "hi").returncode == 0
    (request,) = peer.requests
    assert (request.sampling.top_p, request.sampling.top_k) == (0.5, 3)
    assert request.sampling.min_p == pytest.approx(0.1)
    assert (list(request.stop), request.ignore_eos) == (["x", "y"], True)


def test_a_refusal_is_one_line_with_field_and_request(run: Run, peer: Peer) -> None:
    def refuse(request: object, context: grpc.ServicerContext) -> Iterator[object]:
        context.abort_with_status(
            refusal(grpc.StatusCode.INVALID_ARGUMENT, "is wrong", field="sampling.top_p", request_id="req-7")
        )
        yield

    peer.script = refuse  # type: ignore[assignment]
    done = run("generate", "-m", "a", "--top-p", "2", "hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: sampling.top_p: is wrong (request req-7)\n"


def test_nobody_there_is_one_line_too() -> None:
    commands = (["models", "--address"], ["status", "--admin"], ["quota", "show", "--admin"])
    processes = [
        subprocess.Popen(
            [MUXSERVE, *command, "127.0.0.1:1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
        assert error.startswith("error: ") and error.count("\n") == 1


def test_chat_answers_one_message(run: Run, peer: Peer) -> None:
    done = run("chat", "-m", "a", "--system", "Be kind.", "Who are you?")
    assert (done.returncode, done.stdout) == (0, "Hello world\n")
    turns = [(turn.role, turn.content) for turn in peer.requests[0].chat.messages]
    assert turns == [("system", "Be kind."), ("user", "Who are you?")]


def test_a_conversation_remembers_until_it_starts_over(run: Run, peer: Peer) -> None:
    done = run("chat", "-m", "a", stdin="one\ntwo\n/new\nthree\n/exit\nfour\n")
    assert (done.returncode, done.stdout) == (0, "Hello world\n" * 3)
    turns = [[turn.content for turn in request.chat.messages] for request in peer.requests]
    assert turns == [["one"], ["one", "Hello world", "two"], ["three"]]


def test_a_conversation_goes_on_after_an_error(run: Run, peer: Peer) -> None:
    failures = [refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=2.0)]

    def once(request: object, context: grpc.ServicerContext) -> Iterator[object]:
        if failures:
            context.abort_with_status(failures.pop())
        yield from answer(["fine"], "r", common_pb2.FINISH_REASON_STOP)

    peer.script = once  # type: ignore[assignment]
    done = run("chat", "-m", "a", stdin="one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "fine\n")
    assert "full; try again in 2 s" in done.stderr
    assert [turn.content for turn in peer.requests[1].chat.messages] == ["two"]


def test_models_are_listed(run: Run) -> None:
    done = run("models")
    assert done.returncode == 0
    assert "a" in done.stdout and "ready" in done.stdout
    assert [model["name"] for model in json.loads(run("models", "--json").stdout)] == ["a", "b"]


def test_status_as_json_has_everything_in_documented_fields(run: Run) -> None:
    status = json.loads(run("status", "--json").stdout)
    documented = Path(__file__).parents[2].joinpath("docs", "cli.md").read_text(encoding="utf-8")
    assert status["models"] and status["pool"] and status["executors"] and status["services"]
    for name, value in status.items():
        assert f"`{name}`" in documented
        for key in value[0] if isinstance(value, list) and value else ():
            assert f"`{key}`" in documented, f"{name}.{key} is not in docs/cli.md"
    assert status["pool"][0]["integrity"] == "ok"


def test_status_as_tables_names_every_model_and_service(run: Run) -> None:
    status = json.loads(run("status", "--json").stdout)
    done = run("status")
    assert done.returncode == 0
    for name in [model["name"] for model in status["models"]] + [s["id"] for s in status["services"]]:
        assert name in done.stdout


def test_quotas_are_shown_and_set(run: Run, peer: Peer) -> None:
    shown = json.loads(run("quota", "show", "--json").stdout)
    assert (shown["revision"], shown["blocks"]) == (3, {"a": 10, "b": 20})
    assert (shown["state"], shown["history"][1]["above"]) == ("deferred", ["a"])
    assert shown["use"]["a"] == {"quota": 10, "held": 95, "borrowed": 85, "cached": 5}
    table = run("quota", "show").stdout
    assert "revision 3, deferred" in table and "deferred (above it: a)" in table
    done = run("quota", "set", "a", "512", "--if-revision", "3")
    assert done.returncode == 0 and "512" in done.stdout
    assert peer.quota is not None
    assert (peer.quota.model, peer.quota.blocks, peer.quota.expected_revision) == ("a", 512, 3)


def test_a_quota_is_followed_until_it_is_applied(run: Run, peer: Peer) -> None:
    peer.quota_states = [admin_pb2.QUOTA_STATE_PENDING, admin_pb2.QUOTA_STATE_DEFERRED]
    done = run("quota", "set", "a", "512", "--follow", "30")
    assert done.returncode == 0
    said = [line for line in done.stdout.splitlines() if line.startswith("revision 4")]
    assert said == ["revision 4: pending", "revision 4: deferred", "revision 4: applied"]


def test_a_quota_that_is_overtaken_or_late_is_a_failure(run: Run, peer: Peer) -> None:
    peer.quota_states = [admin_pb2.QUOTA_STATE_STALE]
    overtaken = run("quota", "set", "a", "512", "--follow", "30")
    assert (overtaken.returncode, "revision 4: stale" in overtaken.stdout) == (1, True)
    peer.quota_states = [admin_pb2.QUOTA_STATE_DEFERRED] * 99
    assert run("quota", "set", "a", "512", "--follow", "0.1").returncode == 1


def test_help_is_quick_and_imports_no_grpc() -> None:
    code = (
        "import sys; from muxserve.cli.main import app; sys.exit(bool({'grpc', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=10).returncode == 0


def test_a_reader_that_has_enough_ends_generate_quietly(server: Server) -> None:
    server.peer.script = lambda request, _: answer(["word "] * 2000, request.request_id)
    command = f"{MUXSERVE} generate -m a --address {server.address} hi | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("word word ", "")


def test_plan_shows_moves_and_traffic(run: Run) -> None:
    done = run("plan")
    assert done.returncode == 0
    assert "it is hot" in done.stdout and "worthwhile: better" in done.stdout
    assert json.loads(run("plan", "--json").stdout)["moves"][0]["target"] == "worker-1"


def test_rebalance_shows_what_happens(run: Run, peer: Peer) -> None:
    done = run("rebalance", "--move", "a=worker-1", "--move", "b@worker-1=worker-0", "--drain-seconds", "0.5")
    assert done.returncode == 0, done.stderr
    assert "a from worker-0 to worker-1  loading" in done.stdout and "[1/1]" in done.stdout
    moves = [(m.model, m.source_worker, m.target_worker) for m in peer.asked.moves]  # type: ignore[attr-defined]
    assert moves == [("a", "", "worker-1"), ("b", "worker-1", "worker-0")]
    bad = run("rebalance", "--move", "worker-1")
    assert (bad.returncode, bad.stderr.startswith("error: --move: expected MODEL=WORKER")) == (2, True)


def test_what_was_rolled_back_is_a_failure_of_the_command(run: Run) -> None:
    done = run("unload", "a", "worker-0")
    assert (done.returncode, "rolled back: it was away" in done.stdout) == (1, True)


def test_the_other_operations_reach_the_service(run: Run, peer: Peer) -> None:
    assert run("load", "a", "worker-1").returncode == 0
    assert run("pin", "a").stdout == "a is pinned\n"
    assert run("unpin", "a").stdout == "a is not pinned\n"
    assert run("cancel").stdout == "rolling back a from worker-0 to worker-1\n"
    done = run("drain", "worker-0")
    assert (done.returncode, done.stdout.endswith("worker-0 has 0 models, 0 blocks held\n")) == (0, True)
    assert run("drain", "worker-0", "--undo").stdout == "worker-0 may have models again\n"
    peer.refuse.append(refusal(grpc.StatusCode.NOT_FOUND, 'no worker named "w"'))
    done = run("drain", "w")
    assert (done.returncode, 'no worker named "w"' in done.stderr) == (1, True)
