"""`python -m muxserve.cli.health HOST:PORT [SERVICE]`: is it healthy? For containers; imports little."""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT = 3.0


def run(address: str, service: str = "") -> int:
    """0 if `service` at `address` says SERVING, else 1 with the reason on standard error."""
    with grpc.insecure_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.details() if isinstance(error, grpc.Call) else error}\n")
            return 1
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return 0
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    sys.stderr.write(f"{address}: {name}\n")
    return 1


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:3]))
