"""The field `prompt` of a completion: a text, ids, or a list of either. A million ids keep no other request waiting."""

import asyncio
from array import array
from typing import Annotated

import msgspec
from msgspec import Meta

from fwd.api.body import decoded
from fwd.errors import BadRequestError
from fwd.front.queue import MAX_OPEN
from fwd.protocol.ids import pack_ids
from fwd.protocol.values import TokenId

INLINE = 64 << 10  # bytes of JSON that are decoded at once, without the GIL being given to others in between
Prompt = str | memoryview
Part = TokenId | str | list[TokenId]

_whole = msgspec.json.Decoder(str | Annotated[list[Part], Meta(min_length=1)])
_parts = msgspec.json.Decoder(list[msgspec.Raw])
_ids = msgspec.json.Decoder(list[TokenId])


async def read_prompts(raw: bytes) -> list[Prompt]:
    """The prompts in the JSON `raw`: each a text, or ids as int32s; long ones are read in a thread, piece by piece.

    Raises `BadRequestError` for what is none of the allowed shapes.
    """
    if len(raw) <= INLINE:
        return _read(raw)
    return await asyncio.to_thread(_read_long, raw)


def _read(raw: bytes) -> list[Prompt]:
    value = decoded(_whole, raw, "prompt")
    if isinstance(value, str):
        return [value]
    ids = [part for part in value if isinstance(part, int)]
    texts: list[Prompt] = [part for part in value if isinstance(part, str)]
    lists: list[Prompt] = [pack_ids(part) for part in value if isinstance(part, list)]
    if len(value) not in {len(ids), len(texts), len(lists)}:
        raise BadRequestError("prompt: expected a text, ids, a list of texts or a list of id lists", param="prompt")
    return [pack_ids(ids)] if ids else texts or lists


def _read_long(raw: bytes) -> list[Prompt]:
    """Ids in pieces where that is what there is; everything else, and every mistake, as it is read when it is short."""
    try:
        if _is_flat(raw) and (ids := _read_ids(raw)):
            return [ids]
        if raw.startswith(b"[["):
            check_count(raw.count(b"[") - 1)
            return [_read_ids(bytes(part)) for part in _parts.decode(raw)]
    except msgspec.MsgspecError:
        pass
    return _read(raw)


def check_count(choices: int) -> None:
    """Raise `BadRequestError` for more choices than the daemon ever admits."""
    if choices > MAX_OPEN:
        raise BadRequestError(f"{choices} choices in one request: at most {MAX_OPEN}: send several requests", param="n")


def _is_flat(raw: bytes) -> bool:
    """A list of what is neither text nor list nor object."""
    return raw.startswith(b"[") and not any(raw.find(sign, 1) >= 0 for sign in (b"[", b'"', b"{"))


def _read_ids(raw: bytes) -> memoryview:
    """The ids of a flat list of valid JSON; raises `MsgspecError` for anything else."""
    if not raw.startswith(b"["):
        raise msgspec.ValidationError("no list")
    ids, begin, last = array("i"), 1, raw.rindex(b"]")
    while begin < last:
        end = raw.find(b",", begin + INLINE, last)
        end = last if end < 0 else end
        ids.extend(_ids.decode(b"[" + raw[begin:end] + b"]"))
        begin = end + 1
    return memoryview(ids).cast("B")
