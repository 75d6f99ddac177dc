"""Chat messages in the OpenAI shape, checked and brought into the form that a chat template expects."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from fwd.errors import BadRequestError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MAX_OPTIONS = 32
MAX_OPTION_CHARS = 256
_MAX_OPTION_INT = 2**53
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Chat(NamedTuple):
    """What a template is given: messages, tools, and the caller's own variables."""

    messages: list[dict[str, Any]]
    tools: list[Mapping[str, Any]] | None
    options: dict[str, Any]


class Shape(NamedTuple):
    """Which forms a template handles: content as a list of parts, tool-call arguments as an object."""

    parts: bool
    arguments: bool


def prepare(messages: Sequence[Mapping[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """Fresh messages for the template: no nulls, text parts only, reasoning under each name that templates read."""
    if not messages:
        raise BadRequestError("messages is empty: a chat needs at least one message", param="messages")
    return [_message(n, message, shape) for n, message in enumerate(messages)]


def check_options(options: Mapping[str, Any], reserved: frozenset[str]) -> None:
    """Only booleans, integers and short strings reach a template, under names that it does not use for other things."""
    if len(options) > MAX_OPTIONS:
        raise BadRequestError(f"more than {MAX_OPTIONS} chat template options", param="chat_template_kwargs")
    for name, value in options.items():
        if name in reserved or not name.isidentifier() or not _is_option(value):
            raise BadRequestError(
                f"chat template option {name[:MAX_OPTION_CHARS]!r}: only booleans, integers and strings of at most "
                f"{MAX_OPTION_CHARS} characters are allowed, and none of {', '.join(sorted(reserved))}",
                param="chat_template_kwargs",
            )


def _is_option(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_OPTION_CHARS
    return isinstance(value, int) and abs(value) <= _MAX_OPTION_INT


def _message(n: int, message: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    if str(message.get("role")) not in ROLES:
        raise BadRequestError(
            f"messages.{n}.role must be one of {', '.join(sorted(ROLES))}", param=f"messages.{n}.role"
        )
    prepared = {key: value for key, value in message.items() if value is not None}
    if "content" in prepared:
        prepared["content"] = _content(n, prepared["content"], shape)
    if "tool_calls" in prepared:
        calls = prepared["tool_calls"]
        prepared["tool_calls"] = [
            _tool_call(n, call, shape) for call in (calls if isinstance(calls, list) else [calls])
        ]
    reasoning = next((prepared[key] for key in _REASONING if key in prepared), None)
    return prepared if reasoning is None else {"thinking": reasoning, **prepared, "reasoning_content": reasoning}


def _content(n: int, content: object, shape: Shape) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _content_error(n)
    texts = [_part_text(n, part) for part in content]
    return [{"type": "text", "text": text} for text in texts] if shape.parts else "\n".join(texts)


def _part_text(n: int, part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
    raise _content_error(n)


def _content_error(n: int) -> BadRequestError:
    return BadRequestError(
        f"messages.{n}.content must be a string or a list of text parts: this model reads text only",
        param=f"messages.{n}.content",
    )


def _tool_call(n: int, call: Any, shape: Shape) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(), "arguments": str() | dict() as arguments} as function}:
            return {**call, "function": {**function, "arguments": _arguments(arguments, shape)}}
    raise BadRequestError(
        f"messages.{n}.tool_calls: a function with name and arguments is needed", param=f"messages.{n}.tool_calls"
    )


def _arguments(arguments: str | dict[str, Any], shape: Shape) -> str | dict[str, Any]:
    """Arguments as the template wants them; a string that is no JSON object stays as it is."""
    if isinstance(arguments, dict):
        return arguments if shape.arguments else msgspec.json.encode(arguments).decode()
    if not shape.arguments:
        return arguments
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return arguments
