"""What a config says of quantised weights: `quantization_config` of every public kind → Quantization. No torch here.

Only weights count: `input_activations`, `kv_cache_scheme` and their like are accepted and not used.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from fwd.errors import ModelError
from fwd.models.fields import short
from fwd.models.names import Names, parse_names
from fwd.models.quantization import PLAIN, Quantization, Stored

_KEYS = {"quantization_config": None, "compression_config": "compressed-tensors"}  # with the method where none is named
_EXCEPT = "modules_to_not_convert"
_HEADS = Names(frozenset({"lm_head"}))  # which most methods leave plain without a word
_MAX_SIZE = 1 << 20


def parse_quantization(config: Mapping[str, Any], older: Mapping[str, Any] | None = None) -> Quantization:
    """Read the scheme of a config.json, or of the `hf_quant_config.json` that ModelOpt used to put beside it (`older`).

    Raises ModelError that names the field and what is known, for a method, format or width of numbers that is not.
    """
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        for key, method in _KEYS.items():
            if level.get(key) is not None:
                return _parse(_Table(f"config.json: {key}", level[key]), method)
    if older is not None:
        return _parse(_Table("hf_quant_config.json: quantization", older.get("quantization")), "modelopt")
    return PLAIN


def _parse(table: "_Table", method: str | None) -> Quantization:
    return METHODS[table.one_of("quant_method", METHODS, method)](table)


class _Table:
    """An object of the scheme; what is wrong with a field raises ModelError that names it."""

    def __init__(self, where: str, table: object) -> None:
        if not isinstance(table, dict):
            raise ModelError(f"{where} must be an object, found {short(table)}")
        self.where, self._table = where, table

    def get(self, key: str, default: Any = None) -> Any:
        value = self._table.get(key)
        return default if value is None else value

    def one_of(self, key: str, known: Collection[Any], default: object = None) -> Any:
        value = self.get(key, default)
        if not any(value == each and type(value) is type(each) for each in known):
            listed = ", ".join(map(str, known))
            raise ModelError(f"{self.where}: {key} = {short(value)} is not supported: known are {listed}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        return bool(self.one_of(key, (True, False), default))

    def size(self, key: str) -> int:
        """A number of inputs that share a scale; −1 in the file, 0 here: all."""
        value = self.get(key, 128)
        if type(value) is not int or not (value == -1 or 1 <= value <= _MAX_SIZE):
            raise ModelError(f"{self.where}: {key} must be −1 or from 1 to {_MAX_SIZE}, found {short(value)}")
        return max(value, 0)

    def pair(self, key: str, default: tuple[int, int]) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""
        match self.get(key, list(default)):
            case [int(outputs), int(inputs)] if 0 <= outputs <= _MAX_SIZE and 0 <= inputs <= _MAX_SIZE:
                return outputs, inputs
            case other:
                raise ModelError(f"{self.where}: {key} must be two sizes up to {_MAX_SIZE}, found {short(other)}")

    def names(self, key: str) -> Names:
        return parse_names(self.get(key), f"{self.where}: {key}")

    def tables(self, key: str) -> dict[str, "_Table"]:
        """Objects by name."""
        found = _Table(f"{self.where}: {key}", self.get(key, {}))
        return {name: _Table(f"{found.where}: {name[:80]!r}", value) for name, value in found._table.items()}


def _fp8(table: _Table) -> Quantization:
    """DeepSeek's and transformers' own: blocks, or one scale a matrix."""
    table.one_of("fmt", ("e4m3",), "e4m3")
    return _simple(table, Stored("fp8", table.pair("weight_block_size", (0, 0))))


def _fbgemm(table: _Table) -> Quantization:
    return _simple(table, Stored("fp8", (1, 0)))


def _mxfp4(table: _Table) -> Quantization:
    """gpt-oss: experts only."""
    return Quantization(((Names(frozenset({"experts"})), _MXFP4),), table.names(_EXCEPT))


def _awq(table: _Table) -> Quantization:
    table.one_of("bits", (4,))
    table.one_of("version", ("gemm", "GEMM"), "gemm")
    return _simple(table, Stored("int4", (1, table.size("group_size")), zeros=True, layout="awq"))


def _gptq(table: _Table) -> Quantization:
    table.one_of("bits", (4,))
    table.one_of("is_marlin_format", (False,), False)
    stored = Stored(
        "int4",
        (1, table.size("group_size")),
        zeros=True,
        groups=table.flag("desc_act", default=False),
        layout=table.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq"),
    )
    scheme = _simple(table, stored, head=table.flag("lm_head", default=False))
    return replace(scheme, skipped=scheme.skipped.and_also(_left_out(table)))


def _left_out(table: _Table) -> Names:
    """GPTQModel's `dynamic`: `-:` leaves modules plain; others may change the group, which the files tell anyway."""
    rules, ordered = table.tables("dynamic"), table.flag("desc_act", default=False)
    for name, rule in rules.items():
        if not name.startswith("-:"):
            rule.one_of("bits", (4,), 4)
            rule.one_of("desc_act", (ordered,), ordered)
    expressions = [f"re:{name[2:]}" for name in rules if name.startswith("-:")]
    return parse_names(expressions, f"{table.where}: dynamic")


def _simple(table: _Table, stored: Stored, *, head: bool = False) -> Quantization:
    """One format for all linear layers but those that the config excepts."""
    skipped = table.names(_EXCEPT)
    return Quantization(((None, stored),), skipped if head else skipped.and_also(_HEADS))


def _modelopt(table: _Table) -> Quantization:
    skipped = table.names("ignore" if table.get("ignore") is not None else "exclude_modules")
    algorithm = table.one_of("quant_algo", (*ALGORITHMS, "MIXED_PRECISION", ""), "")
    if algorithm != "MIXED_PRECISION":
        return Quantization(((None, ALGORITHMS[algorithm]),), skipped) if algorithm else PLAIN
    modules: dict[str, set[str]] = {}
    for name, layer in table.tables("quantized_layers").items():
        modules.setdefault(layer.one_of("quant_algo", ALGORITHMS), set()).add(name)
    groups = ((Names(frozenset(names)), ALGORITHMS[each]) for each, names in modules.items())
    return Quantization(tuple(groups), skipped)


def _compressed(table: _Table) -> Quantization:
    if table.get("sparsity_config"):
        _Table(f"{table.where}: sparsity_config", table.get("sparsity_config")).one_of("format", ("dense",), "dense")
    groups = []
    for group in table.tables("config_groups").values():
        if group.get("weights") is not None:
            form = group if group.get("format") is not None else table
            reader = _COMPRESSED[form.one_of("format", _COMPRESSED)]
            groups.append((_targets(group), reader(_Table(f"{group.where}: weights", group.get("weights")))))
    return Quantization(tuple(groups), table.names("ignore"))


def _targets(group: _Table) -> Names | None:
    names = group.names("targets")
    return None if "Linear" in names.plain else names


def _compressed_fp8(weights: _Table) -> Stored:
    weights.one_of("num_bits", (8,))
    weights.one_of("type", ("float",))
    match weights.one_of("strategy", ("tensor", "channel", "block", "group")):
        case "tensor":
            return Stored("fp8", (0, 0))
        case "channel":
            return Stored("fp8", (1, 0))
        case "block":
            return Stored("fp8", weights.pair("block_structure", (128, 128)))
    return Stored("fp8", (1, weights.size("group_size")))


def _compressed_int4(weights: _Table) -> Stored:
    weights.one_of("num_bits", (4,))
    weights.one_of("type", ("int",), "int")
    by_group = weights.one_of("strategy", ("group", "channel"), "group") == "group"
    order = weights.one_of("actorder", ("group", "dynamic", "weight", "static", ""), "")
    return Stored(
        "int4",
        (1, weights.size("group_size") if by_group else 0),
        zeros=not weights.flag("symmetric", default=True),
        groups=order in {"group", "dynamic"},
        scale="BF16",
    )


def _compressed_fp4(weights: _Table, stored: Stored) -> Stored:
    weights.one_of("num_bits", (4,))
    weights.one_of("type", ("float",))
    weights.one_of("group_size", (stored.block[1],))
    return stored


_MXFP4, _NVFP4 = Stored("mxfp4", (1, 32)), Stored("nvfp4", (1, 16))
ALGORITHMS = {
    "FP8": Stored("fp8", (0, 0)),
    "FP8_PER_CHANNEL_PER_TOKEN": Stored("fp8", (1, 0)),
    "FP8_PB_WO": Stored("fp8", (128, 128)),
    "NVFP4": _NVFP4,
}
_COMPRESSED: dict[str, Callable[[_Table], Stored]] = {
    "float-quantized": _compressed_fp8,
    "naive-quantized": _compressed_fp8,
    "pack-quantized": _compressed_int4,
    "nvfp4-pack-quantized": lambda weights: _compressed_fp4(weights, _NVFP4),
    "mxfp4-pack-quantized": lambda weights: _compressed_fp4(weights, _MXFP4),
}
METHODS: dict[str, Callable[[_Table], Quantization]] = {
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
