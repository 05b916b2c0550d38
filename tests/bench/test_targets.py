"""Targets: an OpenAI-compatible server over real HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from muxserve.bench.targets import Failed, Gateway, Late, OpenAI, Refused, Reply, target
from muxserve.bench.workload import Request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[Handler], Awaitable[str]]
REQUEST = Request(0.0, "a", (1, 2, 3), 4, "gold", 5)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server whose completions a handler answers; its URL."""
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> str:
        async def models(_: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "a", "max_model_len": 512}, {"id": "b"}]})

        app = web.Application()
        app.add_routes([web.post("/v1/completions", handler), web.get("/v1/models", models)])
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        host, port = runners[-1].addresses[0][:2]
        return f"http://{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()


def streaming(*events: object) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": keep-alive\n\n")
        for event in events:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    return handler


async def ask(url: str, timeout: float | None = 5.0) -> tuple[Reply, int]:
    """The reply, and how often something arrived."""
    server, reply, pieces = OpenAI(url), Reply(), 0

    def arrived() -> None:
        nonlocal pieces
        pieces += 1

    try:
        await server.send(REQUEST, timeout, reply, arrived)
    finally:
        await server.close()
    return reply, pieces


TOKEN = {"choices": [{"text": "x"}], "usage": None}


async def test_a_stream_is_counted_token_by_token_and_by_its_usage(serve: Serve) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}
    reply, pieces = await ask(await serve(streaming(*[TOKEN] * 5, usage)))
    assert (reply.tokens, reply.prompt_tokens, pieces) == (7, 3, 6)


async def test_a_server_without_usage_is_counted_by_its_events(serve: Serve) -> None:
    reply, _ = await ask(await serve(streaming(*[TOKEN] * 4)))
    assert reply.tokens == 4


async def test_the_request_says_what_the_workload_says(serve: Serve) -> None:
    seen: list[dict[str, object]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json())
        return await streaming(TOKEN)(request)

    await ask(await serve(handler))
    (body,) = seen
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("a", [1, 2, 3], 4)
    assert (body["user"], body["priority"], body["ignore_eos"], body["stream"]) == ("gold", 5, True, True)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_says_when_to_come_back(serve: Serve, status: int) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="busy", headers={"Retry-After": "2"})

    with pytest.raises(Refused, match="busy") as refused:
        await ask(await serve(handler))
    assert refused.value.retry_after == 2


async def test_errors_are_failures(serve: Serve) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=400, text="no such field")

    with pytest.raises(Failed, match="no such field"):
        await ask(await serve(handler))
    with pytest.raises(Failed, match="out of memory"):
        await ask(await serve(streaming(TOKEN, {"error": {"message": "out of memory"}})))
    with pytest.raises(Failed, match="without a token"):
        await ask(await serve(streaming()))


async def test_a_deadline_ends_the_wait(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await request.content.read()
        while True:
            await response.write(b": still there\n\n")

    with pytest.raises(Late):
        await ask(await serve(handler), timeout=0.1)


async def test_models_and_their_contexts_are_listed(serve: Serve) -> None:
    server = OpenAI(f"{await serve(streaming())}/v1/")
    assert await server.contexts() == {"a": 512, "b": 0}
    await server.close()


async def test_nobody_there_is_a_failure() -> None:
    server = OpenAI("http://127.0.0.1:9")
    with pytest.raises(Failed):
        await server.contexts()
    await server.close()


def test_an_address_says_which_kind_it_is() -> None:
    assert isinstance(target("http://127.0.0.1:8000/v1"), OpenAI)
    assert isinstance(target("127.0.0.1:8600"), Gateway)
