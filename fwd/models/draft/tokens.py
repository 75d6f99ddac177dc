"""Whether two tokenizers mean the same by an id. No torch here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwd.errors import ModelError
from fwd.models.fields import short
from fwd.models.safetensors import read_json

TOKENIZER = "tokenizer.json"
_MAX_BYTES = 1 << 28


def difference(one: Path, other: Path) -> str | None:
    """Return how the tokens of two model folders differ, or None.

    An id that only one of them has is no difference. Raises ModelError for a tokenizer.json that cannot be read.
    """
    first, second = (read_json(folder / TOKENIZER, _MAX_BYTES) for folder in (one, other))
    if first == second:
        return None
    mine, its = _tokens(one, first), _tokens(other, second)
    for key in sorted(mine.keys() & its.keys()):
        if mine[key] != its[key]:
            return f"id {key} is {short(mine[key])} in {one}, {short(its[key])} in {other}"
    return None


def have_tokenizers(*folders: Path) -> bool:
    """Whether each of some folders has a tokenizer.json."""
    return all((folder / TOKENIZER).is_file() for folder in folders)


def _tokens(folder: Path, content: bytes) -> dict[int, str]:
    """The token of each id: the vocabulary, then what was added to it."""
    try:
        table = json.loads(content)
        return dict(_vocabulary(table["model"]["vocab"])) | {
            int(token["id"]): str(token["content"]) for token in table.get("added_tokens", ())
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / TOKENIZER} is no tokenizer that is known: {short(error)}") from None


def _vocabulary(vocab: Any) -> Mapping[int, str]:
    """BPE and WordPiece have an id for each token; Unigram has pairs of token and score in their order."""
    if isinstance(vocab, list):
        return {index: str(token) for index, (token, _) in enumerate(vocab)}
    return {int(index): str(token) for token, index in vocab.items()}
