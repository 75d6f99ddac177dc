"""What a config says of positions: rotation, context, windows. No torch here."""

import math
from typing import Any, Literal

from fwd.errors import ModelError
from fwd.models.fields import Fields, short
from fwd.models.spec import RopeSpec

MAX_CONTEXT = 1 << 24  # positions are exact in float32 below
LAYER_TYPES = ("full_attention", "sliding_attention")
Sliding = Literal["never", "late", "all", "even"]

_FULL_LAYERS = 28  # transformers' default of max_window_layers


def read_rope(config: Fields, trained: int, default: dict[str, Any]) -> tuple[RopeSpec, float]:
    """Return the rotation for a context of `trained` tokens, and by what it scales the softmax of latent attention.

    Old fields are `rope_theta` and `rope_scaling` with `type`; new ones `rope_parameters` with `rope_type`, which may
    be keyed by layer type where all are equal. `default` stands for a table that is absent.
    """
    table = _table(config, default)
    table.refuse({"partial_rotary_factor": (1,), "llama_4_scaling_beta": (0,)})
    theta = table.number("rope_theta", 2.0, 1e15, config.number("rope_theta", 2.0, 1e15, 10000.0))
    kind = table.get("rope_type", table.get("type", "default"))
    factor = 1.0 if kind == "default" else table.number("factor", 1.0, 1e6)
    original = table.integer("original_max_position_embeddings", 1, MAX_CONTEXT, trained)
    scale = 1.0 if kind == "default" else _mscale(factor, table.number("mscale_all_dim", 0.0, 100.0, 0.0)) ** 2
    match kind:
        case "default" | "linear":
            return RopeSpec(kind, theta, factor), scale
        case "llama3":
            return _llama3(table, theta, factor, original), scale
        case "yarn":
            return _yarn(table, theta, factor, original), scale
    raise ModelError(
        f"config.json: rope type {short(kind, 80)} is not supported: known are default, linear, llama3, yarn"
    )


def extended(rope: RopeSpec, trained: int) -> int:
    """YaRN configs often leave max_position_embeddings at the length before the extension."""
    longer = max(trained, int(rope.original * rope.factor)) if rope.kind == "yarn" else trained
    if longer > MAX_CONTEXT:
        raise ModelError(f"config.json: factor {rope.factor:g} extends the context to {longer}, over {MAX_CONTEXT}")
    return longer


def read_windows(config: Fields, sliding: Sliding, layers: int, context: int, *, switched: bool) -> tuple[int, ...]:
    """Return each layer's window, as transformers reads it; one that hides nothing of the context is none.

    Without `layer_types`, layers slide `late` (from max_window_layers on), `all`, or those of `even` index do.
    `switched`: `sliding_window` holds only where `use_sliding_window` is true.
    """
    window = _window(config, sliding, switched=switched)
    slides = _sliding_layers(config, sliding, layers, window)
    if any(slides) and sliding == "never":
        raise ModelError("config.json: layer_types other than full_attention are not supported for this architecture")
    if any(slides) and not window:
        missing = "use_sliding_window is not true" if switched else "sliding_window is null"
        raise ModelError(f"config.json: layer_types name sliding_attention, but {missing}")
    return tuple(window if each and window < context else 0 for each in slides)


def _table(config: Fields, default: dict[str, Any]) -> Fields:
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = config.get(key) or default
    if not isinstance(found, dict):
        raise ModelError(f"config.json: {key}: rope parameters must be an object, found {type(found).__name__}")
    nested = [found[kind] for kind in LAYER_TYPES if isinstance(found.get(kind), dict)]
    if any(table != nested[0] for table in nested):
        raise ModelError(f"config.json: {key} that differ between layer types are not supported")
    return Fields(nested[0] if nested else found)


def _llama3(table: Fields, theta: float, factor: float, original: int) -> RopeSpec:
    low, high = (table.number(f"{end}_freq_factor", 1e-6, 1e6) for end in ("low", "high"))
    if high <= low:
        raise ModelError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
    return RopeSpec("llama3", theta, factor, original, low, high)


def _yarn(table: Fields, theta: float, factor: float, original: int) -> RopeSpec:
    """YaRN (Peng et al. 2023); the attention factor and its mscale variants as transformers derives them."""
    scale, scale_all = (table.number(key, 0.0, 100.0, 0.0) for key in ("mscale", "mscale_all_dim"))
    derived = _mscale(factor, scale) / _mscale(factor, scale_all) if scale and scale_all else _mscale(factor, 1.0)
    low, high = table.number("beta_slow", 1e-6, 1e6, 1.0), table.number("beta_fast", 1e-6, 1e6, 32.0)
    if high < low:
        raise ModelError(f"config.json: beta_fast {high:g} must not be below beta_slow {low:g}")
    return RopeSpec(
        "yarn",
        theta,
        factor,
        original,
        low=low,
        high=high,
        attention_factor=table.number("attention_factor", 1e-6, 1e6, derived),
        truncate=table.flag("truncate", default=True),
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _window(config: Fields, sliding: Sliding, *, switched: bool) -> int:
    if config.flag("use_sliding_window") and sliding == "never":
        raise ModelError("config.json: use_sliding_window = True is not supported for this architecture")
    if sliding == "never" or (switched and not config.flag("use_sliding_window")):
        return 0
    if config.get("sliding_window") is None:
        return 0
    return config.integer("sliding_window", 1, MAX_CONTEXT)


def _sliding_layers(config: Fields, sliding: Sliding, layers: int, window: int) -> list[bool]:
    kinds = config.words("layer_types", LAYER_TYPES, layers)
    first = config.integer("max_window_layers", 0, 1 << 20, _FULL_LAYERS) if window and sliding == "late" else layers
    slides = [(bool(window) or sliding == "even") and _slides(sliding, index, first) for index in range(layers)]
    if kinds is None:
        return slides
    named = [kind == "sliding_attention" for kind in kinds]
    if sliding == "all" and named != slides:
        raise ModelError("config.json: layer_types that sliding_window does not say are not supported here")
    return named


def _slides(sliding: Sliding, index: int, first: int) -> bool:
    return {"never": False, "late": index >= first, "all": True, "even": index % 2 == 0}[sliding]
