"""What a client asks for, built from plain options and checked as the daemon will check it."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from fwd.errors import BadRequestError
from fwd.protocol.ids import pack_ids
from fwd.protocol.local import Prompt
from fwd.protocol.messages import Submit
from fwd.protocol.values import Draft, Limits, Sampling

K = TypeVar("K", bound=msgspec.Struct)
_PARTS: dict[str, type[msgspec.Struct]] = {"sampling": Sampling, "limits": Limits, "draft": Draft}


def prompt_message(tag: int, prompt: str | Sequence[dict[str, Any]], options: dict[str, Any]) -> Prompt:
    """The `Prompt` for a text, or for a chat given as messages.

    `options` are fields of `Sampling`, `Limits`, `Draft` and `Prompt` by name, and for a chat `tools` and `kwargs`.
    `prediction` is text, too. Raises `BadRequestError` for an option that does not exist or is out of range.
    """
    if "prediction" in options:
        options = {**options, "prediction": memoryview(options["prediction"].encode())}
    if isinstance(prompt, str):
        return _build(Prompt, options, id=tag, body=memoryview(prompt.encode()))
    chat: dict[str, Any] = {key: options.pop(key) for key in ("tools", "kwargs") if key in options}
    chat["messages"] = prompt
    return _build(Prompt, options, id=tag, kind="chat", body=memoryview(msgspec.json.encode(chat)))


def submit_message(tag: int, prompt: Sequence[int], options: dict[str, Any]) -> Submit:
    """The `Submit` for raw ids; `options` as in `prompt_message`, and fields of `Submit`."""
    packed: dict[str, Any] = {name: pack_ids(options[name]) for name in ("emitted", "prediction") if name in options}
    return _build(Submit, {**options, **packed}, id=tag, prompt=pack_ids(prompt))


def _build(kind: type[K], options: dict[str, Any], /, **own: Any) -> K:
    fields = dict(options)
    for name, part in _PARTS.items():
        if inner := {field: fields.pop(field) for field in part.__struct_fields__ if field in fields}:
            fields[name] = _checked(part, inner)
    return _checked(kind, {**fields, **own})


def _checked(kind: type[K], fields: dict[str, Any]) -> K:
    """A struct whose bounds have been checked as the daemon will."""
    if unknown := sorted(set(fields) - set(kind.__struct_fields__)):
        raise BadRequestError(f"unknown option {unknown[0]!r}", param=unknown[0])
    try:
        return msgspec.convert(msgspec.to_builtins(kind(**fields), builtin_types=(memoryview,)), kind)
    except (TypeError, ValueError) as error:
        raise BadRequestError(_named(kind, str(error))) from error


def _named(kind: type[msgspec.Struct], text: str) -> str:
    """An error of a positional struct with the name of the field instead of its index."""
    place = re.search(r" - at `\$\[(\d+)\].*`", text)
    if place is None:
        return text
    tagged = kind.__struct_config__.tag is not None
    return f"{kind.__struct_fields__[int(place[1]) - tagged]}: {text[: place.start()]}"
