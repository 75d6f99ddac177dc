"""config.json → ModelSpec: every number the forward pass and the planner need, checked. No torch here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fwd.errors import ModelError
from fwd.models.architectures import ARCHITECTURES, NEUTRAL, Architecture, read_latents
from fwd.models.fields import Fields, short
from fwd.models.positions import MAX_CONTEXT, extended, read_rope, read_windows
from fwd.models.spec import Dtype, ModelSpec

MAX_PARAMETERS = 1 << 43
MAX_LAYER_EXPERTS = 1 << 18  # experts of all layers
_MAX_CONFIG_BYTES = 1 << 20
_CONTEXT = "max_position_embeddings"
_SHARED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")  # that may stand beside a text_config


def read_spec(folder: Path) -> ModelSpec:
    """Read `config.json` of a model folder; raises ModelError."""
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    return parse_spec(config)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a small JSON object, None where there is no such file; raises ModelError."""
    try:
        raw = path.read_bytes() if path.stat().st_size <= _MAX_CONFIG_BYTES else b""
        table = json.loads(raw)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(table).__name__}")
    return table


def run_spec(spec: ModelSpec, dtype: str) -> ModelSpec:
    """Return the spec in the dtype it will run in: `auto` is the checkpoint's. Raises ModelError for any other."""
    match spec.dtype if dtype == "auto" else dtype:
        case "float32" | "bfloat16" as name:
            return replace(spec, dtype=name)
        case other:
            raise ModelError(f"{other} is not supported: use --dtype bfloat16 or float32")


def parse_spec(config: dict[str, Any]) -> ModelSpec:
    """Check a Hugging Face config and return its ModelSpec; raises ModelError naming the field."""
    name, known = _architecture(config)
    fields = _fields(config, known)
    fields.refuse(known.neutral | NEUTRAL)
    layers, trained = fields.integer("num_hidden_layers", 1, 4096), fields.integer(_CONTEXT, 1, MAX_CONTEXT)
    heads, kv_heads = _heads(fields, known)
    rope, scale = read_rope(fields, trained, known.rope)
    mla = read_latents(fields, scale) if known.latents else None
    context, biased = extended(rope, trained), known.bias == "config" and fields.flag("attention_bias")
    spec = ModelSpec(
        architecture=name,
        family=known.family,
        layers=layers,
        hidden=fields.integer("hidden_size", 16, 1 << 20),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=mla.nope + mla.rope if mla else _head_dim(fields, heads),
        intermediate=fields.integer("intermediate_size", 8, 1 << 22),
        vocab=fields.integer("vocab_size", 16, 1 << 24),
        eps=fields.number("rms_norm_eps", 0.0, 1.0),
        rope=rope,
        tied=fields.flag("tie_word_embeddings"),
        qkv_bias=biased or known.bias == "qkv",
        output_bias=biased,
        qk_norm=known.qk_norm,
        max_context=context,
        dtype=_dtype(fields),
        windows=read_windows(fields, known.sliding, layers, context, switched=known.switched),
        sinks=known.sinks,
        moe=known.experts(fields, layers) if known.experts else None,
        mla=mla,
        prefix=known.prefix,
        others=known.others,
        mtp=fields.integer("num_nextn_predict_layers", 0, 64, 0) if known.latents else 0,
    )
    return _bounded(spec)


def _architecture(config: dict[str, Any]) -> tuple[str, Architecture]:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"unknown architecture {short(name, 80)}: this build knows {known}")
    return name, ARCHITECTURES[name]


def _fields(config: dict[str, Any], known: Architecture) -> Fields:
    """The fields of the text model under one name each, those that are absent as transformers takes them."""
    text = config
    if known.text:
        nested = config.get(known.text)
        if not isinstance(nested, dict):
            raise ModelError(f"config.json: {known.text} must be an object, found {type(nested).__name__}")
        text = {key: config[key] for key in _SHARED if key in config} | nested
    aliased = {name: text[other] for other, name in known.aliases.items() if other in text}
    return Fields({**known.defaults, **aliased, **text})


def _heads(fields: Fields, known: Architecture) -> tuple[int, int]:
    heads = fields.integer("num_attention_heads", 1, 4096)
    kv_heads = heads if known.latents else fields.integer("num_key_value_heads", 1, 4096, heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    return heads, kv_heads


def _head_dim(fields: Fields, heads: int) -> int:
    width = fields.integer("head_dim", 8, 1024, fields.integer("hidden_size", 16, 1 << 20) // heads)
    if width % 2:
        raise ModelError(f"config.json: head_dim {width} is odd, so RoPE cannot pair it")
    return width


def _dtype(fields: Fields) -> Dtype:
    name: object = fields.get("dtype", fields.get("torch_dtype", "float32"))
    match name:
        case "float32" | "float16" | "bfloat16":
            return name
    raise ModelError(f"config.json: dtype {short(name, 80)} is not supported: known are float32, float16, bfloat16")


def _bounded(spec: ModelSpec) -> ModelSpec:
    """Refuse what no machine holds, before anything is made of it."""
    experts = len(spec.moe.layers) * spec.moe.experts if spec.moe else 0
    if experts > MAX_LAYER_EXPERTS:
        raise ModelError(f"config.json: {experts:,} experts in all layers are over {MAX_LAYER_EXPERTS:,}")
    if spec.parameters() > MAX_PARAMETERS:
        raise ModelError(f"config.json: {spec.parameters():,} parameters are over {MAX_PARAMETERS:,}")
    return spec
