"""Structured output: the fields that say what text an answer must be, in the ways that clients say it, as a grammar.

`response_format` is OpenAI's (text, json_object, json_schema) and Fireworks' (grammar); `guided_*` and
`structured_outputs` are vLLM's older and newer names; `grammar` and `json_schema` are llama.cpp's.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from fwd.api.openai.parameters import Parameters
from fwd.errors import BadRequestError
from fwd.front.service import Service

OBJECT = 'json_schema:{"type":"object"}'
MAX_CHOICES = 4096


async def read_grammar(service: Service, parameters: Parameters) -> str:
    """The grammar of an answer, which can be compiled; "" if any text will do. What said it is let go.

    Raises `BadRequestError` that names the field, `GrammarError` among them, and what `GrammarTrials.check` does.
    """
    asked = list(_asked(parameters))
    if len(asked) > 1:
        (first, _), (second, _), *_ = asked
        raise BadRequestError(f"{second} and {first} both say what the answer must be: leave one out", param=second)
    for param, grammar in asked:
        await service.check_grammar(grammar, param)
    for name in _FIELDS:
        setattr(parameters, name, None)
    return asked[0][1] if asked else ""


def _asked(parameters: Parameters) -> Iterator[tuple[str, str]]:
    """Each field that asks for something, and the grammar that it asks for."""
    for name, read in _FIELDS.items():
        value = getattr(parameters, name)
        if value is not None and (grammar := read(value, name)):
            yield name, grammar


def _format(value: Any, param: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return ""
        case "json_object":
            return OBJECT
        case "json_schema":
            held = value.get("json_schema")
            named = held if isinstance(held, dict) else value
            return _schema(named.get("schema"), f"{param}.json_schema")
        case "grammar":
            return _rules(value.get("grammar"), param)
    raise BadRequestError(f"{param}: its type must be text, json_object, json_schema or grammar", param=param)


def _options(value: Any, param: str) -> str:
    """VLLM's object: one way among many, and options that change no text."""
    if not isinstance(value, dict):
        raise BadRequestError(f"{param}: expected an object", param=param)
    asked = {key: each for key, each in value.items() if each is not None}
    if unknown := sorted(key for key in asked.keys() - _WAYS.keys() if asked[key] is not False):
        wrong = f"{param}.{unknown[0]}"
        raise BadRequestError(f"{wrong} is not supported here: leave it out", param=wrong)
    grammars = [read(asked[way], f"{param}.{way}") for way, read in _WAYS.items() if way in asked]
    found = [grammar for grammar in grammars if grammar]
    if len(found) > 1:
        raise BadRequestError(f"{param}: give one of {', '.join(_WAYS)}", param=param)
    return found[0] if found else ""


def _schema(value: Any, param: str) -> str:
    if isinstance(value, str):
        return f"json_schema:{value}"
    if isinstance(value, dict | bool):
        return f"json_schema:{msgspec.json.encode(value).decode()}"
    raise BadRequestError(f"{param}: expected a JSON schema", param=param)


def _object(value: Any, param: str) -> str:
    if not isinstance(value, bool):
        raise BadRequestError(f"{param}: expected true or false", param=param)
    return OBJECT if value else ""


def _regex(value: Any, param: str) -> str:
    return f"regex:{_text(value, param)}"


def _rules(value: Any, param: str) -> str:
    return f"lark:{_text(value, param)}"


def _llama_rules(value: Any, param: str) -> str:
    """Clients of llama.cpp send all of its parameters; the default of this one is ""."""
    return "" if value == "" else _rules(value, param)


def _choice(value: Any, param: str) -> str:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise BadRequestError(f"{param}: expected strings", param=param)
    if not 0 < len(value) <= MAX_CHOICES:
        raise BadRequestError(f"{param}: {len(value)} strings, expected 1 to {MAX_CHOICES}", param=param)
    return f"regex:{'|'.join(map(re.escape, value))}"


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadRequestError(f"{param}: expected a string that is not empty", param=param)
    return value


_WAYS: dict[str, Callable[[Any, str], str]] = {
    "json": _schema,
    "json_object": _object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _rules,
}
_FIELDS: dict[str, Callable[[Any, str], str]] = {
    "response_format": _format,
    "structured_outputs": _options,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _rules,
    "json_schema": _schema,
    "grammar": _llama_rules,
}
