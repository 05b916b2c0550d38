"""`muxserve bench` against a running deployment, as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Cluster, running
from tests.engine.model_factory import make_model

pytestmark = pytest.mark.timeout(150)
QUICKLY = ("--rate", "12", "--duration", "2", "--scale-lengths", "0.05", "--vocabulary", "200")


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two names for one tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    tiny = make_model("llama", folder / "tiny", head_dim=64, heads=4, kv_heads=2)
    with running(folder, "--model", f"a={tiny}", "--model", f"b={tiny}", "--arena", "16MiB") as up:
        yield up


def test_a_run_reports_every_model_and_writes_all_that_was_asked_for(
    two_models: Cluster, tmp_path: Path
) -> None:
    out, plot, trace = tmp_path / "out.json", tmp_path / "plot.png", tmp_path / "trace.jsonl"
    files = ("--out", str(out), "--plot", str(plot), "--save-trace", str(trace))
    done = two_models.cli("bench", *QUICKLY, "--warmup", "0.5", "--tenant", "x=1", "--tenant", "y=3", *files)
    assert done.returncode == 0, done.stderr
    assert "met SLO" in done.stdout and "fairness" in done.stdout
    raw = json.loads(out.read_text())
    total = raw["report"]["total"]
    sent = len(trace.read_text().splitlines())
    assert sent == len(raw["outcomes"]["at"])
    assert total["ok"] == total["requests"] > 0
    assert set(raw["report"]["models"]) == {"a", "b"} and set(raw["report"]["tenants"]) == {"x", "y"}
    assert raw["outcomes"]["tokens"] == raw["outcomes"]["asked_tokens"]
    assert raw["unloaded"]["a"]["output"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")

    again = two_models.cli("bench", "--trace", str(trace), "--warmup", "0", "--no-calibrate", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["total"]["ok"] == sent
    two_models.wait_idle()


def test_a_search_ends_with_a_rate_and_how_sure_it_is(two_models: Cluster, tmp_path: Path) -> None:
    known = tmp_path / "unloaded.json"
    entry = {"base": 5.0, "prompt": 0.0, "output": 0.0}  # nobody misses that
    known.write_text(json.dumps({"a": entry, "b": entry}))
    done = two_models.cli(
        *("bench", *QUICKLY, "--duration", "1", "--search", "--probes", "2", "--calibration", str(known))
    )
    assert done.returncode == 0, done.stderr
    assert "goodput at 99% of SLO scale 8: 19.20 requests/s (no rate failed)" in done.stdout


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--model", "c"), 1, "no target serves c"),
        (("--rate", "0"), 2, "--rate: must be more than 0"),
        (("--target", "a=127.0.0.1:9"), 1, "127.0.0.1:9"),
        (("--trace", "/nonexistent", "--no-calibrate"), 1, "nonexistent"),
        (("--search", "--no-calibrate"), 1, "--search needs an SLO"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    two_models: Cluster, flags: tuple[str, ...], code: int, said: str
) -> None:
    done = two_models.cli("bench", *flags)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
