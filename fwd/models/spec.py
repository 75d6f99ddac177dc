"""config.json → ModelSpec: every number the forward pass and the planner need, checked. No torch here.

Fields that would change the mathematics in an unsupported way are refused by name; unknown harmless ones are ignored.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fwd.errors import ModelError
from fwd.models.layout import CacheLayout, KVFormat, Latent, Paged, State
from fwd.models.quantization import PLAIN, Quantization

Dtype = Literal["float32", "float16", "bfloat16"]
Family = Literal["dense", "moe", "gpt_oss", "deepseek"]
ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

_MAX_CONFIG_BYTES = 1 << 20
_MAX_CONTEXT = 1 << 24
_WINDOW, _FULL_LAYERS = 4096, 28  # transformers' defaults of sliding_window and max_window_layers
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "hidden_act": ("silu",),
    "mlp_bias": (None, False),
    "pretraining_tp": (None, 1),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: `kind` names the scaling rule, which uses some of the fields (see `fwd.models.rope`)."""

    kind: Literal["default", "linear", "llama3", "yarn"]
    theta: float
    factor: float = 1.0
    original: int = 0  # original_max_position_embeddings
    low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast
    attention_factor: float = 1.0  # multiplies cos and sin
    truncate: bool = True  # yarn: round the ends of the ramp


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """`experts` of width `intermediate`, of which a token visits `top_k` (see `fwd.kernels.ops.Router`)."""

    experts: int
    top_k: int
    intermediate: int
    scoring: Literal["softmax", "topk_softmax", "sigmoid"]
    normalize: bool
    layers: tuple[int, ...]  # that have experts; the others have a plain MLP
    shared: int = 0  # width of the expert that every token visits
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    bias: bool = False  # of router and experts


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Latent attention (see `kernels.ops.Latents`): widths of the latents and of the parts of a head."""

    q_rank: int  # 0: queries come straight from the hidden state
    latent: int
    nope: int
    rope: int
    value: int
    scale: float  # of the softmax
    interleaved: bool = True  # the checkpoint pairs 2i with 2i + 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's dimensions. `dtype` is the checkpoint's, or what the model was loaded as."""

    architecture: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    rope: RopeSpec
    tied: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    max_context: int
    dtype: Dtype
    windows: tuple[int, ...]  # per layer: tokens a row sees, itself included; 0: all
    sinks: bool = False  # a learned logit without a value in each head's softmax
    moe: ExpertSpec | None = None
    mla: LatentSpec | None = None
    quantization: Quantization = PLAIN
    prefix: str = ""  # of the names of all tensors
    others: tuple[str, ...] = ()  # prefixes of tensors that are not the text model's (vision)
    mtp: int = 0  # layers that predict further tokens; they follow the others in the checkpoint

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused q, k, v projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def rotated(self) -> int:
        """Numbers of a head that are rotated."""
        return self.mla.rope if self.mla else self.head_dim

    @property
    def cache(self) -> tuple[CacheLayout, ...]:
        """The cache layouts of this model: one per window."""
        if self.mla:
            return (Latent(tuple(range(self.layers)), self.mla.latent, self.mla.rope),)
        layers: dict[int, list[int]] = {}
        for layer, window in enumerate(self.windows):
            layers.setdefault(window, []).append(layer)
        return tuple(Paged(tuple(own), self.kv_heads, self.head_dim, window) for window, own in layers.items())

    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        q = self.heads * self.head_dim
        biases = self.qkv_bias * self.qkv_width + self.output_bias * self.hidden
        norms = 2 * self.hidden + 2 * self.qk_norm * self.head_dim
        return self.hidden * (self.qkv_width + q + 3 * self.intermediate) + biases + norms

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return (self.layers * self.layer_parameters() + self.hidden + tables) * ITEMSIZE[self.dtype]

    def kv_bytes(self, context: int, kv: KVFormat) -> int:
        """Bytes of cache that a row at the end of `context` tokens reads."""
        return sum(_read_bytes(layout, context, kv) for layout in self.cache)

    def step_bytes(self, rows: int, context: int, kv: KVFormat) -> int:
        """Bytes a decode step of `rows` sequences at `context` tokens each must read: layers, head, embeddings, KV."""
        read_once = self.layers * self.layer_parameters() + self.hidden + self.vocab * self.hidden
        return (read_once + rows * self.hidden) * ITEMSIZE[self.dtype] + rows * self.kv_bytes(context, kv)


def _read_bytes(layout: CacheLayout, context: int, kv: KVFormat) -> int:
    match layout:
        case State():
            return layout.record_bytes
        case Paged(window=window) if window:
            return min(context, window) * layout.token_bytes(kv)
    return context * layout.token_bytes(kv)


@dataclass(frozen=True, slots=True)
class _Family:
    qkv_bias: bool | None  # None: the config's attention_bias, which then also biases the output projection
    qk_norm: bool
    default_head_dim: int | None
    sliding: bool = False  # some layers may see a window of the context only


FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(qkv_bias=None, qk_norm=False, default_head_dim=None),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, qk_norm=False, default_head_dim=None, sliding=True),
    "Qwen3ForCausalLM": _Family(qkv_bias=None, qk_norm=True, default_head_dim=128, sliding=True),
}


def read_spec(folder: Path) -> ModelSpec:
    """Read `config.json` of a model folder; raises ModelError."""
    path = folder / "config.json"
    try:
        raw = path.read_bytes() if path.stat().st_size <= _MAX_CONFIG_BYTES else b""
        config = json.loads(raw)
    except FileNotFoundError:
        raise ModelError(f"{folder} is no model folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return parse_spec(config)


def run_spec(spec: ModelSpec, dtype: str) -> ModelSpec:
    """Return the spec in the dtype it will run in: `auto` is the checkpoint's. Raises ModelError for any other."""
    match spec.dtype if dtype == "auto" else dtype:
        case "float32" | "bfloat16" as name:
            return replace(spec, dtype=name)
        case other:
            raise ModelError(f"{other} is not supported: use --dtype bfloat16 or float32")


def parse_spec(config: dict[str, Any]) -> ModelSpec:
    """Check a Hugging Face config and return its ModelSpec; raises ModelError naming the field."""
    architecture, family = _family(config)
    _refuse_unsupported(config)
    attention_bias = _flag(config, "attention_bias")
    hidden, heads = _integer(config, "hidden_size", 16, 1 << 20), _integer(config, "num_attention_heads", 1, 4096)
    kv_heads = _integer(config, "num_key_value_heads", 1, 4096, heads)
    head_dim = _integer(config, "head_dim", 8, 1024, family.default_head_dim or hidden // heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim {head_dim} is odd, so RoPE cannot pair it")
    trained = _integer(config, "max_position_embeddings", 1, _MAX_CONTEXT)
    rope = _rope(config, trained)
    context = _extended(rope, trained)
    layers = _integer(config, "num_hidden_layers", 1, 4096)
    return ModelSpec(
        architecture=architecture,
        family="dense",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_integer(config, "intermediate_size", 8, 1 << 22),
        vocab=_integer(config, "vocab_size", 16, 1 << 24),
        eps=_number(config, "rms_norm_eps", 0.0, 1.0),
        rope=rope,
        tied=_flag(config, "tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias and family.qkv_bias is None,
        qk_norm=family.qk_norm,
        max_context=context,
        dtype=_dtype(config),
        windows=_windows(config, family, layers, context),
    )


def _family(config: dict[str, Any]) -> tuple[str, _Family]:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"unknown architecture {repr(name)[:80]}: this build knows {', '.join(sorted(FAMILIES))}")
    return name, FAMILIES[name]


def _refuse_unsupported(config: dict[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        if config.get(key, neutral[0]) not in neutral:
            raise ModelError(f"config.json: {key} = {repr(config[key])[:80]} is not supported")


def _windows(config: dict[str, Any], family: _Family, layers: int, context: int) -> tuple[int, ...]:
    """Each layer's window, as transformers reads it; one that hides nothing of the context is none."""
    window = _window(config, family)
    sliding = _sliding_layers(config, window, layers)
    if any(sliding) and not family.sliding:
        raise ModelError("config.json: layer_types other than full_attention are not supported for this architecture")
    if any(sliding) and not window:
        raise ModelError("config.json: layer_types name sliding_attention, but use_sliding_window is not true")
    return tuple(window if slides and window < context else 0 for slides in sliding)


def _window(config: dict[str, Any], family: _Family) -> int:
    if config.get("use_sliding_window") is None or not _flag(config, "use_sliding_window"):
        return 0
    if not family.sliding:
        raise ModelError("config.json: use_sliding_window = True is not supported for this architecture")
    if config.get("sliding_window", _WINDOW) is None:
        return 0
    return _integer(config, "sliding_window", 1, _MAX_CONTEXT, _WINDOW)


def _sliding_layers(config: dict[str, Any], window: int, layers: int) -> list[bool]:
    kinds = config.get("layer_types")
    if kinds is None:
        first = _integer(config, "max_window_layers", 0, 1 << 20, _FULL_LAYERS) if window else layers
        return [index >= first for index in range(layers)]
    if not isinstance(kinds, list) or any(kind not in _LAYER_TYPES for kind in kinds):
        raise ModelError(f"config.json: layer_types must be a list of {' or '.join(_LAYER_TYPES)}")
    if len(kinds) != layers:
        raise ModelError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers {layers}")
    return [kind == "sliding_attention" for kind in kinds]


def _rope(config: dict[str, Any], context: int) -> RopeSpec:
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, dict):
        raise ModelError(f"config.json: rope parameters must be an object, found {type(table).__name__}")
    if table.get("partial_rotary_factor", 1) != 1:
        raise ModelError(f"config.json: partial_rotary_factor = {table['partial_rotary_factor']!r} is not supported")
    theta = _number({"rope_theta": config.get("rope_theta", 10000.0), **table}, "rope_theta", 2.0, 1e15)
    kind = table.get("rope_type", table.get("type", "default"))
    factor = 1.0 if kind == "default" else _number(table, "factor", 1.0, 1e6)
    original = _integer(table, "original_max_position_embeddings", 1, _MAX_CONTEXT, context)
    match kind:
        case "default" | "linear":
            return RopeSpec(kind, theta, factor)
        case "llama3":
            low, high = _number(table, "low_freq_factor", 1e-6, 1e6), _number(table, "high_freq_factor", 1e-6, 1e6)
            if high <= low:
                raise ModelError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
            return RopeSpec("llama3", theta, factor, original, low, high)
        case "yarn":
            return _yarn(table, theta, factor, original)
    raise ModelError(
        f"config.json: rope type {repr(kind)[:80]} is not supported: known are default, linear, llama3, yarn"
    )


def _extended(rope: RopeSpec, context: int) -> int:
    """YaRN configs often leave max_position_embeddings at the length before the extension."""
    extended = max(context, int(rope.original * rope.factor)) if rope.kind == "yarn" else context
    if extended > _MAX_CONTEXT:
        raise ModelError(f"config.json: factor {rope.factor:g} extends the context to {extended}, over {_MAX_CONTEXT}")
    return extended


def _yarn(table: dict[str, Any], theta: float, factor: float, original: int) -> RopeSpec:
    """YaRN (Peng et al. 2023); the attention factor and its mscale variants as transformers derives them."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    scale, scale_all = (_number(table, key, 0.0, 100.0, 0.0) for key in ("mscale", "mscale_all_dim"))
    derived = mscale(scale) / mscale(scale_all) if scale and scale_all else mscale(1.0)
    return RopeSpec(
        "yarn",
        theta,
        factor,
        original,
        low=_number(table, "beta_slow", 1e-6, 1e6, 1.0),
        high=_number(table, "beta_fast", 1e-6, 1e6, 32.0),
        attention_factor=_number(table, "attention_factor", 1e-6, 1e6, derived),
        truncate=table.get("truncate", True) is not False,
    )


def _dtype(config: dict[str, Any]) -> Dtype:
    match config.get("dtype") or config.get("torch_dtype") or "float32":
        case "float32" | "float16" | "bfloat16" as name:
            return name
        case other:
            raise ModelError(
                f"config.json: dtype {repr(other)[:80]} is not supported: known are float32, float16, bfloat16"
            )


def _integer(table: dict[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    value = default if table.get(key) is None else table[key]
    if type(value) is not int or not low <= value <= high:
        raise ModelError(f"config.json: {key} must be an integer from {low} to {high}, found {repr(value)[:40]}")
    return value


def _number(table: dict[str, Any], key: str, low: float, high: float, default: float | None = None) -> float:
    value: Any = default if table.get(key) is None else table[key]
    if type(value) not in {int, float} or not low <= value <= high:
        raise ModelError(f"config.json: {key} must be a number from {low:g} to {high:g}, found {repr(value)[:40]}")
    return float(value)


def _flag(table: dict[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be true or false, found {repr(value)[:40]}")
    return value
