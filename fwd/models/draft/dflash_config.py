"""DFlash's config.json (arXiv 2602.06036, z-lab's checkpoints; attention modes as vLLM resolves them). No torch here.

`target_layer_ids` name the blocks that features come out of.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fwd.errors import ModelError
from fwd.models.draft.body import layer_ids, layer_windows, layouts, read_body, refuse_hidden
from fwd.models.draft.costs import layer_parts, sizes, vectors, widest
from fwd.models.draft.spec import DraftSpec
from fwd.models.draft.tensors import Shapes, check_tensors, layer_shapes
from fwd.models.fields import Fields
from fwd.models.positions import LAYER_TYPES
from fwd.models.safetensors import Entry
from fwd.models.spec import ModelSpec, Part

LAYERS, SINKS = "layers.{}.", "self_attn.attention_sink_bias"
MAX_BLOCK = 16  # rows of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class DFlashSpec(DraftSpec):
    """A block drafter's layers, and in which of them a row of a block does not see those after it."""

    body: ModelSpec
    causal: tuple[bool, ...]


def read_dflash(folder: Path, config: Mapping[str, Any], files: Mapping[str, Entry], target: ModelSpec) -> DFlashSpec:
    """Return what a DFlash folder says of its drafter; raises ModelError as `read_eagle` does."""
    own = config.get("dflash_config")
    fields = Fields(dict(config) | (own if isinstance(own, dict) else {}))
    _refuse(fields, target)
    body = _body(config, fields, target)
    refuse_hidden(folder, body.hidden, target, "embedding and head are the target's")
    block, notes = _block(fields)
    taps = _taps(fields, body, target)
    features = len(taps) * target.hidden
    reference, kernels = sizes(body, _parts(body, features), target, width=widest(body) + features)
    draft = DFlashSpec(
        kind="dflash",
        folder=folder,
        shift=1,
        block=block,
        taps=taps,
        features=features,
        hidden=body.hidden,
        cache=layouts(body),
        context=body.max_context,
        rotated=body.head_dim,
        reference=reference,
        kernels=kernels,
        mask=fields.integer("mask_token_id", 0, target.vocab - 1),
        notes=notes,
        body=body,
        causal=_causal(config, fields, body),
    )
    check_tensors(folder, files, _shapes(draft), "DFlash")
    return draft


def _refuse(fields: Fields, target: ModelSpec) -> None:
    """What would change the mathematics and is not taken, and other targets."""
    fields.refuse({"is_neox_style": (True,), "attention_mode": ("gqa", "mha"), "causal_head": (False,)})
    fields.refuse({"draft_vocab_size": (target.vocab,), "target_hidden_size": (target.hidden,), "logit_scale": (1,)})
    layers = fields.integer("num_target_layers", 1, 4096, target.layers)
    if layers != target.layers:
        raise ModelError(f"config.json: num_target_layers is {layers}, the target has {target.layers}")


def _body(config: Mapping[str, Any], fields: Fields, target: ModelSpec) -> ModelSpec:
    defaults: dict[str, Any] = {"vocab_size": target.vocab}
    if not any(config.get(key) for key in ("rope_theta", "rope_scaling", "rope_parameters")):
        defaults["rope_theta"] = 1e6
    body = read_body(defaults | dict(config), "Qwen3ForCausalLM", target)
    window = fields.get("swa_window_size", fields.get("sliding_window"))
    windows = layer_windows(fields, body.layers, window)
    if fields.flag("use_swa") and not any(windows):  # then all layers slide
        windows = layer_windows(Fields({"layer_types": [LAYER_TYPES[1]] * body.layers}), body.layers, window)
    return replace(body, windows=windows, sinks=fields.flag("attention_sink_bias"))


def _block(fields: Fields) -> tuple[int, tuple[str, ...]]:
    """Rows of a block, and a note where a step holds fewer."""
    block = fields.integer("block_size", 2, 1024)
    if block <= MAX_BLOCK:
        return block, ()
    return MAX_BLOCK, (f"DFlash: block_size is {block}: blocks of {MAX_BLOCK} are drafted, which a step holds",)


def _taps(fields: Fields, body: ModelSpec, target: ModelSpec) -> tuple[int, ...]:
    """As the config says, or evenly from the second block to the last but two."""
    ids = fields.get("target_layer_ids")
    if ids is None:
        last, gaps = target.layers - 3, body.layers - 1
        evenly = [round(1 + index * (last - 1) / gaps) for index in range(body.layers)] if gaps else []
        ids = evenly or [target.layers // 2]
    return layer_ids(ids, "target_layer_ids", shift=0, target=target)


def _causal(config: Mapping[str, Any], fields: Fields, body: ModelSpec) -> tuple[bool, ...]:
    """What the config says; else the layers that it names as sliding are causal, and no others."""
    for key in ("is_causal", "causal"):
        if fields.get(key) is not None:
            return (fields.flag(key),) * body.layers
    if config.get("layer_types") is None:
        return (False,) * body.layers
    return tuple(kind == LAYER_TYPES[1] for kind in config["layer_types"])


def _parts(body: ModelSpec, features: int) -> list[Part]:
    inner = [part for index in range(body.layers) for part in layer_parts(body, LAYERS.format(index))]
    return [Part("fc", (body.hidden,), features), vectors(2 * body.hidden), *inner]


def _shapes(draft: DFlashSpec) -> Shapes:
    body, width = draft.body, draft.hidden
    found: Shapes = {"fc.weight": (width, draft.features), "norm.weight": (width,), "hidden_norm.weight": (width,)}
    for index in range(body.layers):
        found |= layer_shapes(body, LAYERS.format(index), width)
        if body.sinks:
            found[LAYERS.format(index) + SINKS] = (body.heads,)
    return found
