"""From what a client sends to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from muxserve.common.errors import InvalidArgument
from muxserve.gateway.tokenizer import Tokenizer
from muxserve.v1 import inference_pb2

INLINE = 8192
"""Texts up to this many characters are tokenized on the event loop, in a millisecond or two."""

ALWAYS_TOKENIZED = 64 * 1024
"""Bytes of text that are never refused unseen: an odd tokenizer may make few tokens of many bytes."""

FIELDS = {"prompt": "prompt", "prompt_tokens": "prompt_tokens", "chat": "chat.messages"}
"""The field that an error about the prompt names, by the input that was given."""


async def encode(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, context: int, threads: ThreadPoolExecutor
) -> Sequence[int]:
    """Token ids of the request's prompt or conversation. Long texts are worked on in a thread.

    Raises InvalidArgument for a text that cannot fit `context` tokens, before it is tokenized, and for a
    conversation that the model's template refuses; FailedPrecondition if the model has no template.
    """
    if request.WhichOneof("input") == "chat":
        messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
        size = sum(len(message["content"]) for message in messages)

        def chat() -> list[int]:
            text = tokenizer.render(messages)
            check_size("chat.messages", text, tokenizer, context)
            return tokenizer.encode(text, add_special_tokens=False)

        return chat() if size <= INLINE else await _in_thread(threads, chat)
    prompt = request.prompt
    check_size("prompt", prompt, tokenizer, context)
    if len(prompt) <= INLINE:
        return tokenizer.encode(prompt)
    return await _in_thread(threads, lambda: tokenizer.encode(prompt))


def check_size(field: str, text: str, tokenizer: Tokenizer, context: int) -> None:
    """Refuse a text that is too long whatever its tokens are."""
    most = max(context * tokenizer.longest_token_bytes, ALWAYS_TOKENIZED)
    if len(text) > most or (4 * len(text) > most and len(text.encode()) > most):
        reason = f"a text of {len(text.encode())} bytes cannot fit the model's context of {context} tokens"
        raise InvalidArgument(field, reason)


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[[], list[int]]) -> list[int]:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
