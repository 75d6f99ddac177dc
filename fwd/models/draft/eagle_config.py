"""EAGLE-3's config.json, as published (Li et al. 2025, SafeAILab/EAGLE, SpecForge) or by `speculators`. No torch here.

Ids of layers at the top of a config, and `layer_ids`, are vLLM's: a feature is what goes into that layer. Those of
`eagle_config.eagle_aux_hidden_state_layer_ids` are SpecForge's and SGLang's: it is what comes out of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fwd.errors import ModelError
from fwd.models.draft.body import layer_ids, layer_windows, layouts, read_body, refuse_hidden
from fwd.models.draft.costs import FILL, layer_parts, sizes, vectors, widest
from fwd.models.draft.spec import DraftSizes, DraftSpec
from fwd.models.draft.tensors import Shapes, check_tensors, layer_shapes
from fwd.models.fields import Fields, short
from fwd.models.safetensors import Entry
from fwd.models.spec import EMBEDDING, HEAD, ModelSpec, Part

FIRST, LAYERS = "midlayer.", "layers.{}."
_IDS = "eagle_aux_hidden_state_layer_ids"
_CONTEXT = "max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleSpec(DraftSpec):
    """What differs between EAGLE-3 heads, in the words of their configs."""

    body: ModelSpec  # its layers; the first has rows of twice the width
    first: str  # before the names of the first layer's tensors
    vocab: int  # of its head
    mapped: bool  # its ids are `d2t` away from the target's
    own_embedding: bool
    own_head: bool
    norm_before_residual: bool  # the normed feature is what the first layer adds to
    norm_before_fc: bool  # features are normed as one
    fc_norm: bool  # features are normed each
    norm_output: bool  # the next row takes normed hidden

    def prefix(self, layer: int) -> str:
        """What stands before the names of a layer's tensors."""
        return LAYERS.format(layer) if layer else self.first


def read_eagle(folder: Path, config: Mapping[str, Any], files: Mapping[str, Entry], target: ModelSpec) -> EagleSpec:
    """Return what an EAGLE-3 folder says of its head; raises ModelError for what is wrong or not for the target."""
    speculators = "speculators_model_type" in config
    layer = _layer(config) if speculators else config
    eagle = config.get("eagle_config")
    flags = Fields((eagle if isinstance(eagle, dict) else {}) | dict(config))
    _refuse(flags)
    body = _body(layer, files, target)
    taps, notes = _taps(config, target)
    vocab = flags.integer("draft_vocab_size", 16, target.vocab, target.vocab)
    normed = flags.flag("norm_output")
    reference, kernels = _sizes(body, vocab, len(taps) * target.hidden, files, target, ones=normed * body.hidden)
    draft = EagleSpec(
        kind="eagle",
        folder=folder,
        shift=1,
        block=1,
        taps=taps,
        features=len(taps) * flags.integer("target_hidden_size", 1, 1 << 20, target.hidden),
        hidden=body.hidden,
        cache=layouts(body),
        context=max(body.max_context, target.max_context),
        rotated=body.head_dim,
        reference=reference,
        kernels=kernels,
        notes=notes + _short(body, target),
        body=body,
        first=FIRST if any(name.startswith(FIRST) for name in files) else LAYERS.format(0),
        vocab=vocab,
        mapped="d2t" in files,
        own_embedding="embed_tokens.weight" in files,
        own_head="lm_head.weight" in files,
        norm_before_residual=flags.flag("norm_before_residual", default=speculators),
        norm_before_fc=flags.flag("norm_before_fc"),
        fc_norm=flags.flag("fc_norm"),
        norm_output=normed,
    )
    _check(draft, files, target)
    return draft


def _refuse(flags: Fields) -> None:
    """What would change the mathematics and is not taken."""
    if flags.get("parallel_drafting"):
        raise ModelError("config.json: parallel_drafting = True: P-EAGLE is not supported, but EAGLE-3 is")
    flags.refuse({"use_aux_hidden_state": (True,), "logit_scale": (1,)})
    if flags.flag("norm_before_fc") and flags.flag("fc_norm"):
        raise ModelError("config.json: norm_before_fc and fc_norm exclude each other")


def _layer(config: Mapping[str, Any]) -> dict[str, Any]:
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise ModelError(f"config.json: transformer_layer_config must be an object, found {short(layer)}")
    return layer


def _body(layer: Mapping[str, Any], files: Mapping[str, Entry], target: ModelSpec) -> ModelSpec:
    defaults = {_CONTEXT: 2048, "num_hidden_layers": 1, "vocab_size": target.vocab}
    kept = {key: value for key, value in layer.items() if value is not None}
    body, fields = read_body(defaults | kept, "LlamaForCausalLM", target), Fields(layer)
    return replace(
        body,
        windows=layer_windows(fields, body.layers, fields.get("sliding_window")),
        qk_norm=any(name.endswith("self_attn.q_norm.weight") for name in files),
        output_bias=any(name.endswith("self_attn.o_proj.bias") for name in files),
    )


def _short(body: ModelSpec, target: ModelSpec) -> tuple[str, ...]:
    """A note where a config names a shorter context than the target has: such heads take the whole of it."""
    if body.max_context >= target.max_context:
        return ()
    return (f"EAGLE-3: {_CONTEXT} is {body.max_context}: it is used up to the target's {target.max_context}",)


def _taps(config: Mapping[str, Any], target: ModelSpec) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The blocks after which features are, and a note where the config names none."""
    eagle = config.get("eagle_config")
    nested = eagle if isinstance(eagle, dict) else {}
    for key, table, shift in ((_IDS, config, 1), ("layer_ids", nested, 1), (_IDS, nested, 0)):
        if table.get(key):
            return layer_ids(table[key], key, shift=shift, target=target), ()
    default = [2, target.layers // 2, target.layers - 3]
    found = layer_ids(default, _IDS, shift=1, target=target)
    return found, (f"EAGLE-3: no {_IDS} in config.json: features are taken where most heads have them, {default}",)


def _sizes(
    body: ModelSpec, vocab: int, features: int, files: Mapping[str, Entry], target: ModelSpec, *, ones: int
) -> tuple[DraftSizes, DraftSizes]:
    """What it takes; so many `ones` are the weights of a norm that changes nothing."""
    norms = sum(entry.shape[0] for name, entry in files.items() if _is_feature_norm(name) and entry.shape)
    needed = [Part("fc", (body.hidden,), features), vectors(norms + ones), vectors(body.hidden)]
    needed += _first_parts(body)
    for index in range(1, body.layers):
        needed += layer_parts(body, LAYERS.format(index))
    if "embed_tokens.weight" in files:
        needed.append(Part(EMBEDDING, (target.vocab,), body.hidden, kept="model"))
    if "lm_head.weight" in files:
        needed.append(Part(HEAD, (vocab,), body.hidden))
    mapped = "d2t" in files
    needed += [Part("", (2 * vocab,), kept="float32")] if mapped else []  # int64 ids
    logits = 4 * vocab * mapped
    width = widest(body) + 2 * (2 * body.hidden + FILL) + features
    return sizes(body, needed, target, width=width, logits=logits)


def _first_parts(body: ModelSpec) -> Iterator[Part]:
    """The first layer, whose attention takes two rows and what fills them up."""
    for part in layer_parts(body, LAYERS.format(0)):
        wider = part.module.endswith("self_attn.q_proj")
        yield part._replace(inputs=2 * body.hidden + FILL) if wider else part
    yield vectors(body.hidden + FILL)


def _is_feature_norm(name: str) -> bool:
    return name == "input_norm.weight" or name.startswith("fc_norm.")


def _check(draft: EagleSpec, files: Mapping[str, Entry], target: ModelSpec) -> None:
    """The files hold what the config says, and the target has what they do not."""
    if draft.features != len(draft.taps) * target.hidden:
        width = draft.features // len(draft.taps)
        raise ModelError(f"{draft.folder}: made for rows of {width}, hidden_size of the target is {target.hidden}")
    if not draft.own_embedding:
        refuse_hidden(draft.folder, draft.hidden, target, "it has no embedding of its own (embed_tokens.weight)")
    if not draft.own_head:
        refuse_hidden(draft.folder, draft.hidden, target, "it has no head of its own (lm_head.weight)")
        if draft.vocab != target.vocab:
            raise ModelError(f"{draft.folder}: draft_vocab_size is {draft.vocab}, but there is no lm_head.weight")
    if draft.vocab != target.vocab and not draft.mapped:
        raise ModelError(f"{draft.folder}: draft_vocab_size is {draft.vocab}, but there is no d2t")
    known = files["t2d"].shape if "t2d" in files else (target.vocab,)
    if known != (target.vocab,):
        raise ModelError(f"{draft.folder}: made for a vocabulary of {known[0]}, that of the target has {target.vocab}")
    check_tensors(draft.folder, files, _shapes(draft, target), "EAGLE-3")


def _shapes(draft: EagleSpec, target: ModelSpec) -> Shapes:
    body, width = draft.body, draft.hidden
    found: Shapes = {"fc.weight": (width, draft.features), "norm.weight": (width,)}
    for index in range(body.layers):
        found |= layer_shapes(body, draft.prefix(index), width if index else 2 * width)
    found[f"{draft.first}hidden_norm.weight"] = (width,)
    if draft.norm_before_fc:
        found["input_norm.weight"] = (draft.features,)
    if draft.fc_norm:
        found |= {f"fc_norm.{index}.weight": (target.hidden,) for index in range(len(draft.taps))}
    if draft.own_embedding:
        found["embed_tokens.weight"] = (target.vocab, width)
    if draft.own_head:
        found["lm_head.weight"] = (draft.vocab, width)
    if draft.mapped:
        found["d2t"] = (draft.vocab,)
    return found
