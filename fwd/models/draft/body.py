"""The layers of a draft model that is made for a target, read as those of a dense model. No torch here."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fwd.errors import ModelError
from fwd.models.config import parse_spec
from fwd.models.fields import Fields, short
from fwd.models.layout import CacheLayout, Paged
from fwd.models.positions import LAYER_TYPES, MAX_CONTEXT
from fwd.models.quantization import PLAIN
from fwd.models.spec import ModelSpec

_WINDOWS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "architectures")


def read_body(config: Mapping[str, Any], architecture: str, target: ModelSpec) -> ModelSpec:
    """Return the layers that a config tells of, in the dtype of the target, none of them within a window.

    Raises ModelError naming the field.
    """
    kept = {key: value for key, value in config.items() if key not in _WINDOWS}
    body = parse_spec(kept | {"architectures": [architecture], "tie_word_embeddings": False})
    if body.quantization != PLAIN:
        raise ModelError("config.json: quantization_config: quantised drafters are not supported, but plain ones are")
    if body.vocab != target.vocab:
        raise ModelError(f"config.json: vocab_size is {body.vocab}, that of the target {target.vocab}")
    return replace(body, dtype=target.dtype)


def layer_windows(fields: Fields, layers: int, window: object) -> tuple[int, ...]:
    """Return the window of each layer that `layer_types` says slides; `window` is what it slides by, 0 is none."""
    kinds = fields.words("layer_types", LAYER_TYPES, layers) or [LAYER_TYPES[0]] * layers
    if LAYER_TYPES[1] not in kinds:
        return (0,) * layers
    if type(window) is not int or not 0 < window < MAX_CONTEXT:
        raise ModelError(f"config.json: sliding_window must be an integer from 1 on, found {short(window)}")
    return tuple(window if kind == LAYER_TYPES[1] else 0 for kind in kinds)


def layouts(body: ModelSpec) -> tuple[CacheLayout, ...]:
    """Return the cache of the layers, one layout a window."""
    return tuple(
        Paged(tuple(i for i, own in enumerate(body.windows) if own == window), body.kv_heads, body.head_dim, window)
        for window in dict.fromkeys(body.windows)
    )


def layer_ids(value: object, key: str, *, shift: int, target: ModelSpec) -> tuple[int, ...]:
    """Check a list of the target's layers; return the blocks after which the features are, in their order.

    `shift` is 1 where an id names the block that a feature goes into.
    """
    if not isinstance(value, list) or not value or any(type(each) is not int for each in value):
        raise ModelError(f"config.json: {key} must be a list of layers, found {short(value)}")
    taps = tuple(sorted({each - shift for each in value}))
    wrong = next((tap for tap in taps if not 0 <= tap < target.layers), None)
    if wrong is not None:
        raise ModelError(f"config.json: {key} names layer {wrong + shift}, the target has {target.layers}")
    return taps


def refuse_hidden(folder: Path, hidden: int, target: ModelSpec, what: str) -> None:
    """Raise ModelError where rows of the drafter and of the target have not the same width, and must."""
    if hidden != target.hidden:
        raise ModelError(f"{folder}: hidden_size is {hidden}, that of the target {target.hidden}: {what}")
