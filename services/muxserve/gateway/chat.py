"""Renders conversations with a model's chat template (Jinja, as published with Hugging Face checkpoints).

Templates come with the checkpoint and are not trusted: they run in Jinja's immutable sandbox and see plain
strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from muxserve.common.errors import InvalidArgument


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(form: str) -> str:
    """The local time: what templates print as today's date."""
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_now)
    return environment


class BrokenTemplateError(ValueError):
    """The template is not valid Jinja."""


class ChatTemplate:
    """A compiled template.

    `special_tokens` are variables that it may name, for example {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises BrokenTemplateError."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BrokenTemplateError(str(error)) from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the conversation up to and including the header of the assistant's next turn.

        Raises InvalidArgument for "chat.messages" if the template refuses the conversation or fails on it.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            reason = f"refused by the model's chat template: {error}"
            raise InvalidArgument("chat.messages", reason) from error
        except Exception as error:
            # A template is a program: anything may come out of it, and the conversation set it off.
            reason = f"the model's chat template fails on it: {type(error).__name__}: {error}"
            raise InvalidArgument("chat.messages", reason) from error
