"""The Jinja environment of chat templates: what Hugging Face templates use, in a sandbox, and bounded."""

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED = 2**24  # characters
_MAX_POWER = 4096  # bits


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Multiplication and powers are the operators by which a short template makes a huge value: both are bounded."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _bits(left) * abs(right) > _MAX_POWER:
            raise SecurityError(f"a power of more than {_MAX_POWER} bits")
        if operator == "*" and max(_repeated(left, right), _repeated(right, left)) > MAX_RENDERED:
            raise SecurityError(f"a repetition longer than {MAX_RENDERED}")
        return super().call_binop(context, operator, left, right)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _repeated(sequence: Any, count: Any) -> int:
    return len(sequence) * count if isinstance(sequence, str | list | tuple) and isinstance(count, int) else 0


def compile_template(source: str) -> Template:
    """Compile; raises `jinja2.TemplateSyntaxError`."""
    return _ENVIRONMENT.from_string(source)


def render_bounded(template: Template, variables: dict[str, Any]) -> str:
    """Render at most `MAX_RENDERED` characters; raises `jinja2.TemplateError`, or what its filters raise."""
    blocks, size = [], 0
    for block in template.generate(variables):
        blocks.append(block)
        size += len(block)
        if size > MAX_RENDERED:
            raise TemplateError(f"the rendered chat is longer than {MAX_RENDERED} characters")
    return "".join(blocks)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may pass it by name
    return datetime.now().strftime(format)  # noqa: DTZ005 - templates mean the local date


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


_ENVIRONMENT = _environment()
RESERVED = frozenset(_ENVIRONMENT.globals)
