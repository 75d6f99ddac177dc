"""config.json → ModelSpec: every number the forward pass and the planner need, checked. No torch here."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fwd.errors import ConfigError, ModelError
from fwd.models.architectures import ARCHITECTURES, NEUTRAL, Architecture, read_latents
from fwd.models.fields import Fields, short
from fwd.models.positions import MAX_CONTEXT, extended, read_rope, read_windows
from fwd.models.quantization import read_from
from fwd.models.safetensors import INDEX, SINGLE, Entry, headers, list_files, read_json
from fwd.models.schemes import parse_quantization
from fwd.models.spec import EMBEDDING, HEAD, LAYER, REQUANT, Dtype, ModelSpec, parts

MAX_PARAMETERS = 1 << 43
MAX_LAYER_EXPERTS = 1 << 18  # experts of all layers
_MAX_CONFIG_BYTES = 1 << 20
_CONTEXT = "max_position_embeddings"
_SHARED = ("dtype", "torch_dtype", "tie_word_embeddings")  # that may stand beside a text_config
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by their names in safetensors
_PLAIN = {*_DTYPES, "F8_E4M3"}  # of which one number is one of the matrix


def read_spec(folder: Path) -> ModelSpec:
    """Read what a model folder says of its model: configs, and headers of the weights that are there.

    Raises ModelError, whatever is wrong with them.
    """
    config = read_object(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    return parse_spec(config, read_object(folder / "hf_quant_config.json"), entries_of(folder))


def entries_of(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a folder; none where weights are still to come, which loading will say."""
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        return {}
    return headers(folder) if all(path.exists() for path in list_files(folder).files) else {}


def read_object(path: Path) -> dict[str, Any] | None:
    """Return what a small file holds, a JSON object; None where there is none. Raises ModelError."""
    if not os.path.lexists(path):
        return None
    try:
        table = json.loads(read_json(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(table).__name__}")
    return table


def run_spec(spec: ModelSpec, dtype: str, requant: Sequence[str] = ()) -> ModelSpec:
    """Return the spec in the dtype it will run in: `auto` is the checkpoint's. Raises ModelError for any other.

    Matrices that are plain become what `requant` says; raises ConfigError where it says nothing that is known, or that
    changes nothing.
    """
    match spec.dtype if dtype == "auto" else dtype:
        case "float32" | "bfloat16" as name:
            return _requantised(replace(spec, dtype=name), requant)
        case other:
            raise ModelError(f"{other} is not supported: use --dtype bfloat16 or float32")


def _requantised(spec: ModelSpec, requant: Sequence[str]) -> ModelSpec:
    for name in requant:
        if name not in REQUANT:
            raise ConfigError(f"requant: unknown {short(name, 40)}: use {', '.join(REQUANT)}")
        if replace(spec, requant=frozenset({name})).weights() == spec.weights():
            raise ConfigError(f"requant: {name} changes nothing: the model has no such matrix that is plain")
    return replace(spec, requant=frozenset(requant))


def parse_spec(
    config: Mapping[str, Any], older: Mapping[str, Any] | None = None, files: Mapping[str, Entry] | None = None
) -> ModelSpec:
    """Check a Hugging Face config and return its ModelSpec; raises ModelError naming the field.

    `older` is the `hf_quant_config.json` beside it; `files`, by tensor, tell what the configs do not, and win where
    they speak of formats.
    """
    name, known = _architecture(config)
    fields, scheme = _fields(config, known), parse_quantization(config, older)
    fields.refuse(known.neutral | NEUTRAL)
    embedding = files.get(f"{known.prefix}{EMBEDDING}.weight") if files else None
    spec = _read(name, known, fields, embedding)
    if files:
        _check_layers(spec, files)
        spec = replace(spec, tied=spec.tied or _tied_outside(config, known, files))
    spec = _bounded(replace(spec, quantization=read_from(scheme, files) if files else scheme))
    _check_shapes(spec, files or {})
    return spec


def _read(name: str, known: Architecture, fields: Fields, embedding: Entry | None) -> ModelSpec:
    layers, trained = fields.integer("num_hidden_layers", 1, 4096), fields.integer(_CONTEXT, 1, MAX_CONTEXT)
    heads, kv_heads = _heads(fields, known)
    rope, scale = read_rope(fields, trained, known.rope)
    mla = read_latents(fields, scale) if known.latents else None
    context, biased = extended(rope, trained), known.bias == "config" and fields.flag("attention_bias")
    return ModelSpec(
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
        dtype=_dtype(fields, embedding),
        windows=read_windows(fields, known.sliding, layers, context, switched=known.switched),
        sinks=known.sinks,
        moe=known.experts(fields, layers) if known.experts else None,
        mla=mla,
        prefix=known.prefix,
        others=known.others,
        mtp=fields.integer("num_nextn_predict_layers", 0, 64, 0) if known.latents else 0,
    )


def _architecture(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"unknown architecture {short(name, 80)}: this build knows {known}")
    return name, ARCHITECTURES[name]


def _fields(config: Mapping[str, Any], known: Architecture) -> Fields:
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


def _dtype(fields: Fields, embedding: Entry | None) -> Dtype:
    """The dtype that the config names, else that of the embedding."""
    found = _DTYPES.get(embedding.dtype, "float32") if embedding else "float32"
    name: object = fields.get("dtype", fields.get("torch_dtype", found))
    match name:
        case "float32" | "float16" | "bfloat16":
            return name
    raise ModelError(f"config.json: dtype {short(name, 80)} is not supported: known are float32, float16, bfloat16")


def _check_layers(spec: ModelSpec, files: Mapping[str, Entry]) -> None:
    """Files hold the layers that the config counts, no more and no fewer."""
    pattern = re.compile(re.escape(spec.prefix) + LAYER.replace(".", r"\.").format(r"(\d{1,9})"))
    found = {name: int(each[1]) for name in files if (each := pattern.match(name))}
    counted = f"num_hidden_layers is {spec.layers} in config.json"
    beyond = min((name for name, index in found.items() if index >= spec.layers + spec.mtp), default=None)
    if beyond is not None:
        raise ModelError(f"{files[beyond].path}: tensor {beyond} has no place: {counted}")
    absent = min(set(range(spec.layers)).difference(found.values()), default=None)
    if found and absent is not None:
        path = files[min(found)].path
        raise ModelError(f"{path.parent} holds no layer {absent}, but {counted}")


def _check_shapes(spec: ModelSpec, files: Mapping[str, Entry]) -> None:
    """The first of the matrices that stand above each other, where one number of the files is one of the matrix.

    Whatever else is wrong loading says as it comes to it; here sizes of a config are refused that are not the files'.
    """
    for part in parts(spec):
        name, shape = f"{spec.prefix}{part.module}.weight", (part.heights[0], part.inputs)
        entry = files.get(name)
        if entry is not None and entry.dtype in _PLAIN and entry.shape != shape:
            raise ModelError(f"{entry.path}: {name} has shape {list(entry.shape)}, expected {list(shape)}")


def _tied_outside(config: Mapping[str, Any], known: Architecture, files: Mapping[str, Entry]) -> bool:
    """Whether the head of a text model within others is tied though its own config does not say so.

    For transformers the outer field counts, unless the files have a head.
    """
    head = f"{known.prefix}{HEAD}."
    tied = bool(known.text) and config.get("tie_word_embeddings") is True
    return tied and not any(name.startswith(head) for name in files)


def _bounded(spec: ModelSpec) -> ModelSpec:
    """Refuse what no machine holds, before anything is made of it."""
    experts = len(spec.moe.layers) * spec.moe.experts if spec.moe else 0
    if experts > MAX_LAYER_EXPERTS:
        raise ModelError(f"config.json: {experts:,} experts in all layers are over {MAX_LAYER_EXPERTS:,}")
    if spec.parameters() > MAX_PARAMETERS:
        raise ModelError(f"config.json: {spec.parameters():,} parameters are over {MAX_PARAMETERS:,}")
    return spec
