"""Ports for servers that tests stop and start again."""

from __future__ import annotations

import random
import socket

PORTS = range(10_000, 20_000)
"""Below the kernel's range for outgoing connections, one of which could otherwise take the port of a server
while that is stopped; and not those that a deployment takes."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                # Binding alone succeeds beside another socket with SO_REUSEADDR; listening does not.
                probe.listen()
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")
