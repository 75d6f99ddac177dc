"""The two instances of one tokenizer.json: *full* knows the added tokens, *plain* cannot produce them from any text."""

import secrets
from typing import Any

import msgspec
import tokenizers


def build_full(document: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer as written, but match added tokens in raw text wherever that gives the same match.

    A token that is matched after normalization would also be found in text that only looks like it (NFKC).
    """
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    normalizer = _build({**document, "model": empty, "added_tokens": []}).normalizer
    added = document["added_tokens"]
    if normalizer is not None:
        changed = [normalizer.normalize_str(token["content"]) != token["content"] for token in added]
        added = [
            {**token, "normalized": token["normalized"] and new} for token, new in zip(added, changed, strict=True)
        ]
    return _build({**document, "added_tokens": added})


def build_plain(document: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer with names for its control tokens that no text spells; ids stay as they are."""
    nonce = secrets.token_hex(16)
    control = [token["content"] for token in document["added_tokens"] if is_control(token["content"], token["special"])]
    names = {content: f"{nonce}:{n}" for n, content in enumerate(control)}
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in document["added_tokens"]]
    return _build({**document, "added_tokens": added, "model": _renamed(document["model"], names)})


def is_control(content: str, special: bool) -> bool:
    """Whether an added token steers the model; words, letters and runs of space are text that some vocabularies add."""
    text = content.replace("▁", " ").strip()
    return special or not (len(text) <= 1 or text.isalnum())


def _renamed(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Give the pieces of these names their new ones, and drop the merges that would make the old ones."""
    if model["type"] == "Unigram":
        return {**model, "vocab": [[names.get(piece, piece), score] for piece, score in model["vocab"]]}
    model = {**model, "vocab": {names.get(piece, piece): i for piece, i in model["vocab"].items()}}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in map(_pair, model["merges"]) if names.keys().isdisjoint(_touched(merge))]
    return model


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _touched(merge: list[str]) -> tuple[str, ...]:
    return (*merge, "".join(merge))


def _build(document: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(msgspec.json.encode(document).decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
