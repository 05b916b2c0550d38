"""How a client behaves (`ClientOptions`) and how tokens are chosen (`Sampling`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import grpc

_LOOPBACK = ("127.", "localhost", "[::1]", "::1", "unix:", "ipv4:127.", "ipv6:[::1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Options of a client. ValueError, with the field's name, where one is out of range."""

    timeout: float = 600.0
    """Seconds that a call may take from its start to its last message, retries included. `math.inf`: no
    limit. It is sent along as the deadline, so that the service stops working on calls nobody waits for."""
    max_retries: int = 2
    """Further attempts after UNAVAILABLE, if nothing was received yet and the timeout allows it. 0: none,
    and a server that cannot be reached is an error at once. Nothing else is retried; in particular
    `Overloaded` is not, because the caller knows better what to do with a full queue."""
    connect_timeout: float = 5.0
    """Seconds that a retry waits for a connection, and that one attempt to connect may take."""
    keepalive: float = 60.0
    """Seconds of silence after which a ping checks that the server is still there. `math.inf`: never."""
    max_message_bytes: int = 16 * 2**20
    """Largest message, either way."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Sent with every call, for example `(("authorization", "Bearer ..."),)`. Keys are lower case."""
    credentials: grpc.ChannelCredentials | None = None
    """TLS, as made by `grpc.ssl_channel_credentials`. None: plain text."""

    def __post_init__(self) -> None:
        for name in ("timeout", "connect_timeout", "keepalive"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {getattr(self, name)!r}")
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, not {self.max_retries!r}")
        if self.max_message_bytes < 1:
            raise ValueError(f"max_message_bytes must be 1 or more, not {self.max_message_bytes!r}")


def with_timeout(options: ClientOptions | None, timeout: float | None) -> ClientOptions:
    """The options, or the default ones, with another timeout if one is given."""
    options = options or ClientOptions()
    return options if timeout is None else replace(options, timeout=timeout)


def channel_options(target: str, options: ClientOptions) -> list[tuple[str, int]]:
    """gRPC channel arguments."""
    connect_ms = math.ceil(options.connect_timeout * 1000)
    arguments = [
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        # A restarted server is found again quickly; an address that swallows packets is given up in time.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.min_reconnect_backoff_ms", connect_ms),
    ]
    if math.isfinite(options.keepalive):
        arguments += [
            ("grpc.keepalive_time_ms", math.ceil(options.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
    if target.startswith(_LOOPBACK):
        arguments.append(("grpc.enable_http_proxy", 0))  # gRPC would send even 127.0.0.1 to an http_proxy
    return arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. None is the service's default; the service checks the ranges."""

    temperature: float | None = None
    """Softmax temperature, 0 to 100. 0 is greedy. Default 1."""
    top_p: float | None = None
    """Nucleus: the smallest set of tokens whose probability reaches top_p, in (0, 1]. Default 1, which is
    off."""
    top_k: int | None = None
    """Keep the k most likely tokens. Default 0, which is off."""
    min_p: float | None = None
    """Keep tokens with at least min_p times the probability of the most likely one. Default 0, which is
    off."""
    seed: int | None = None
    """The same seed and prompt give the same text. Default: drawn anew for each request."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens already seen, multiplies negative ones, in (0, 10]. Default 1."""
    presence_penalty: float | None = None
    """Subtracted once from the logit of every token already in the output, -2 to 2. Default 0."""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit per occurrence in the output, -2 to 2. Default 0."""


class Arguments(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream`, `chat` and `chat_stream`. None is the same as leaving one
    out."""

    sampling: Sampling | None
    """How tokens are chosen; the keywords below replace single fields of it."""
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    max_tokens: int | None
    """Most tokens to generate. Default: as many as the model's context allows."""
    stop: str | Sequence[str] | None
    """Strings that end the generation; not part of the text. At most 16, of 1 to 256 bytes each."""
    stop_token_ids: Sequence[int] | None
    """Token ids that end the generation. At most 64."""
    ignore_eos: bool | None
    """Go on past end-of-sequence tokens. Default False."""
    logprobs: int | None
    """Return log-probabilities of each chosen token and of this many most likely ones, 0 to 20. Default:
    none."""
    request_id: str | None
    """For tracing: at most 128 printable ASCII characters. Default: a new one for each attempt."""
    priority: int | None
    """Requests of higher priority go first: -100 to 100. Default 0."""
    tenant: str | None
    """On whose behalf: tenants that were served more than others wait behind them. At most 128 printable
    ASCII characters. Default: the empty name."""
    timeout: float | None
    """Seconds; default: the client's. `math.inf`: no limit."""


SAMPLING_FIELDS = tuple(Sampling.__dataclass_fields__)
ARGUMENT_FIELDS = frozenset(Arguments.__annotations__)
