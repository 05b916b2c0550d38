"""The SDK needs grpcio and protobuf, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.client.peer import Server

PROTO = Path(__file__).resolve().parents[2] / "proto"

STREAM = """
from muxserve.client import AdminClient, Client
with Client(ADDRESS, timeout=20) as client:
    print("".join(chunk.text for chunk in client.stream("a", "Hi")))
    print(client.chat("a", [{"role": "user", "content": "Hi"}]).usage.completion_tokens)
with AdminClient(ADDRESS) as admin:
    print(admin.status().workers[0].pool.total_blocks)
"""
EXPECTED = "Hello world\n2\n1000\n"

# Whatever is not the standard library, grpcio with its one dependency, protobuf or the SDK is refused.
ONLY = """
import sys
sys.path.insert(0, PROTO)
ALLOWED = {"grpc", "google", "typing_extensions", "muxserve"} | sys.stdlib_module_names
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top, _, rest = name.partition(".")
        if top not in ALLOWED or top == "google" and rest and not rest.startswith(("protobuf", "_upb")):
            raise ModuleNotFoundError(f"refused: {name}", name=name)
        if top == "muxserve" and rest and rest.split(".")[0] not in ("client", "v1"):
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
try:
    import grpc_status
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the hook does not work")
"""


def _run(python: str, code: str, address: str) -> str:
    prefix = f"ADDRESS = {address!r}\nPROTO = {str(PROTO)!r}\n"
    command = [python, "-I", "-W", "error", "-c", prefix + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_streams_where_nothing_else_can_be_imported(server: Server) -> None:
    assert _run(sys.executable, ONLY + STREAM, server.address) == EXPECTED


def test_it_does_not_clash_with_the_public_protos(server: Server) -> None:
    public = "from google.rpc import error_details_pb2, status_pb2\nfrom grpc_status import rpc_status\n"
    assert _run(sys.executable, STREAM + public, server.address) == EXPECTED
    assert _run(sys.executable, public + STREAM, server.address) == EXPECTED


@pytest.mark.slow
def test_it_streams_in_a_clean_virtual_environment(server: Server, tmp_path: Path) -> None:
    """Installs the two packages with pip, from wherever pip is configured to find them."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "grpcio", "protobuf<7"], check=True, timeout=150
    )
    path = "import sys\nsys.path.insert(0, PROTO)\n"
    assert _run(python, path + STREAM, server.address) == EXPECTED
