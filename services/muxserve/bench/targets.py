"""Servers under test: MuxServe by gRPC, or anything with OpenAI's HTTP interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp

from muxserve.bench.workload import Request
from muxserve.client import (
    Arguments,
    AsyncClient,
    ClientOptions,
    DeadlineExceeded,
    MuxServeError,
    Overloaded,
    Unavailable,
)

KEEPALIVE = 2.0
"""Seconds that an idle HTTP connection is kept."""


class Refused(Exception):
    """The server would not take the request now."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Late(Exception):
    """The request's deadline passed."""


class Failed(Exception):
    """The server failed, or cannot be used."""


class Reply:
    """What has arrived of an answer; filled while it does."""

    __slots__ = ("prompt_tokens", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.prompt_tokens = 0
        """As the server counted them; 0: not said."""


class Target(Protocol):
    """A server. To be closed."""

    @property
    def name(self) -> str:
        """Where it is."""
        ...

    async def contexts(self) -> dict[str, int]:
        """Longest sequence in tokens of each model it serves; 0: not said. Raises Failed."""
        ...

    async def send(
        self, request: Request, timeout: float | None, reply: Reply, arrived: Callable[[], None]
    ) -> None:
        """Read one answer to its end; `arrived` is called after `reply` grew. `timeout`: seconds from now.

        Raises Refused, Late, Failed.
        """
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


def target(address: str, key: str = "") -> Target:
    """http(s)://… is an OpenAI-compatible server, anything else a MuxServe gateway (host:port)."""
    return OpenAI(address, key) if urlsplit(address).scheme in ("http", "https") else Gateway(address)


class Gateway:
    """A MuxServe gateway, by gRPC."""

    def __init__(self, address: str) -> None:
        self.name = address.removeprefix("grpc://")
        # Nothing is tried again: a retry would hide what is measured.
        self._client = AsyncClient(self.name, options=ClientOptions(timeout=3600, max_retries=0))

    async def contexts(self) -> dict[str, int]:
        """See `Target`."""
        try:
            models = await self._client.models(timeout=10)
        except MuxServeError as error:
            raise Failed(f"{self.name}: {error}") from error
        return {model.name: model.context_length for model in models if model.state.served}

    async def send(
        self, request: Request, timeout: float | None, reply: Reply, arrived: Callable[[], None]
    ) -> None:
        """See `Target`."""
        arguments: Arguments = {
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "timeout": timeout,
        }
        if request.tenant:
            arguments["tenant"] = request.tenant
        if request.priority:
            arguments["priority"] = request.priority
        given: dict[str, Any] = (
            {"prompt": request.prompt}
            if isinstance(request.prompt, str)
            else {"prompt_tokens": request.prompt}
        )
        try:
            async with self._client.stream(request.model, **given, **arguments) as stream:
                async for chunk in stream:
                    if chunk.token_ids:
                        reply.tokens += len(chunk.token_ids)
                        arrived()
                reply.prompt_tokens = stream.result.usage.prompt_tokens
        except (Overloaded, Unavailable) as error:
            raise Refused(error.message, error.retry_after) from error
        except DeadlineExceeded as error:
            raise Late(error.message) from error
        except MuxServeError as error:
            raise Failed(f"{type(error).__name__}: {error.message}") from error

    async def close(self) -> None:
        """See `Target`."""
        await self._client.close()


class OpenAI:
    """A server with OpenAI's completions, streamed as server-sent events.

    Every event with a choice counts as one token until the last one says how many there were.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.name = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    @property
    def _http(self) -> aiohttp.ClientSession:
        """Made when it is first needed, because it belongs to the event loop that runs then."""
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            # Shorter than servers keep theirs: else a request may meet a connection that is being closed.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(), headers=headers
            )
        return self._session

    async def contexts(self) -> dict[str, int]:
        """See `Target`."""
        try:
            async with asyncio.timeout(10), self._http.get(f"{self.name}/v1/models") as response:
                if response.status != 200:
                    raise Failed(f"{self.name}: HTTP {response.status} for /v1/models")
                listed = (await response.json())["data"]
                return {str(model["id"]): int(model.get("max_model_len") or 0) for model in listed}
        except (aiohttp.ClientError, OSError, TimeoutError, KeyError, TypeError, ValueError) as error:
            raise Failed(f"{self.name}: {error or type(error).__name__}") from error

    async def send(
        self, request: Request, timeout: float | None, reply: Reply, arrived: Callable[[], None]
    ) -> None:
        """See `Target`."""
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        body: dict[str, Any] = {
            "model": request.model,
            "prompt": prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.tenant:
            body["user"] = request.tenant
        if request.priority:
            body["priority"] = request.priority
        try:
            async with (
                asyncio.timeout(timeout),
                self._http.post(f"{self.name}/v1/completions", json=body) as response,
            ):
                if response.status != 200:
                    raise await _refusal(response)
                async for line in response.content:
                    if _take(line, reply):
                        arrived()
        except TimeoutError as error:
            raise Late(f"no end within {timeout} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        if reply.tokens == 0:
            raise Failed("the answer ended without a token")

    async def close(self) -> None:
        """See `Target`."""
        if self._session is not None:
            await self._session.close()


def _take(line: bytes, reply: Reply) -> bool:
    """Take one line of an event stream; whether a token came with it. Raises Failed.

    Events are not parsed unless they say something new: most are, but for their text, like the one before.
    """
    if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
        return False
    if reply.tokens and b'"usage":{' not in line.replace(b" ", b"") and b'"error"' not in line:
        reply.tokens += 1
        return True
    event = json.loads(line[5:])
    if "error" in event:
        raise Failed(str(event["error"]))
    before = reply.tokens
    if usage := event.get("usage"):
        reply.tokens = int(usage["completion_tokens"])
        reply.prompt_tokens = int(usage.get("prompt_tokens", 0))
    elif event.get("choices"):
        reply.tokens += 1
    return reply.tokens > before


async def _refusal(response: aiohttp.ClientResponse) -> Exception:
    """What an answer other than 200 means."""
    text = f"HTTP {response.status}: {(await response.text())[:300]}"
    if response.status in (429, 503):
        after = response.headers.get("Retry-After", "")
        return Refused(text, float(after) if after.isdigit() else None)
    return Late(text) if response.status in (408, 504) else Failed(text)
