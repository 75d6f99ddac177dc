"""In which format each matrix of a checkpoint is: what its config says, or its files, which win. No torch here.

What a config says of activations and of the KV cache is not used: activations stay in the model's dtype, the KV cache
has scales of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from fwd.errors import ModelError
from fwd.kernels.blocking import common_rows
from fwd.models.names import NO_NAMES, Names
from fwd.models.safetensors import Entry

Format = Literal["fp32", "fp16", "bf16", "fp8", "mxfp4", "nvfp4", "int4"]  # of `fwd.kernels.qtensor`

_PLAIN = ("embed_tokens", "gate", "router", "eh_proj")  # whatever a config says; its files may know better


@dataclass(frozen=True, slots=True)
class Stored:
    """The format of one matrix, and how many outputs and inputs share a scale (0: all of them)."""

    format: Format
    block: tuple[int, int] = (1, 1)
    zeros: bool = False  # int4: zero points are stored
    groups: bool = False  # int4: in activation order
    scale: str = "F16"  # int4: the dtype of scales, as safetensors names it
    layout: str = ""  # of the files, a key of LAYOUTS; empty where only the config is known

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of the matrix as a `QTensor`: numbers, scales, zeros and outer factors."""
        rows, columns = (
            -(-length // (size or length)) for length, size in zip((outputs, inputs), self.block, strict=True)
        )
        scale = 4 if self.scale == "F32" else 2
        match self.format:
            case "fp8":
                return outputs * inputs + 4 * rows * columns
            case "mxfp4":
                return outputs * (inputs // 2 + columns)
            case "nvfp4":
                return outputs * (inputs // 2 + columns + 4)
            case "int4":
                return outputs * (inputs // 2 + columns * (scale + self.zeros)) + 4 * inputs * self.groups
        return outputs * inputs * (4 if self.format == "fp32" else 2)

    def fused(self, heights: Sequence[int]) -> "Stored":
        """The format of matrices of these heights when they stand one above the other in one `QTensor`."""
        blocks = [self.block[0] or height for height in heights]
        return replace(self, block=(common_rows(blocks, heights), self.block[1])) if heights[1:] else self


@dataclass(frozen=True, slots=True)
class Quantization:
    """The scheme of a checkpoint; without one every matrix is plain."""

    groups: tuple[tuple[Names | None, Stored], ...] = ()  # the first whose names have a module is its; None: all
    skipped: Names = NO_NAMES
    modules: Mapping[str, Stored | str] | None = field(default=None, repr=False)  # of the files, or why it has none

    def format_of(self, module: str) -> Stored | None:
        """Return the format of the matrix of a module (`model.layers.0.mlp.up_proj`); None: plain.

        Raises ModelError where the files hold it in a layout that is not known.
        """
        if self.modules is not None:
            found = self.modules.get(module)
            if isinstance(found, str):
                raise ModelError(found)
            return found
        if not self.groups or self.skipped.has(module) or module.rpartition(".")[2] in _PLAIN:
            return None
        return next((stored for names, stored in self.groups if names is None or names.has(module)), None)


PLAIN = Quantization()


# ---- What files hold ----


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format stands in files: the suffixes of a module's tensors with the dtypes each may have."""

    format: Format
    tensors: Mapping[str, tuple[str, ...]]  # the first holds the numbers
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # that may be there


_FLOATS, _BYTES, _WORDS = ("F32", "BF16", "F16"), ("U8",), ("I32",)
_COLUMNS = {".qweight": _WORDS, ".qzeros": _WORDS, ".scales": _FLOATS}
LAYOUTS: dict[str, Layout] = {
    # DeepSeek, Qwen, Mistral
    "fp8_inv": Layout("fp8", {".weight": ("F8_E4M3",), ".weight_scale_inv": _FLOATS}),
    # compressed-tensors, ModelOpt, fbgemm
    "fp8": Layout("fp8", {".weight": ("F8_E4M3",), ".weight_scale": _FLOATS}),
    # gpt-oss: the experts of a layer in one tensor
    "mxfp4_blocks": Layout("mxfp4", {"_blocks": _BYTES, "_scales": _BYTES}),
    # compressed-tensors
    "mxfp4_packed": Layout("mxfp4", {".weight_packed": _BYTES, ".weight_scale": ("U8", "F8_E8M0")}),
    "nvfp4_packed": Layout(
        "nvfp4", {".weight_packed": _BYTES, ".weight_scale": ("F8_E4M3",), ".weight_global_scale": ("F32",)}
    ),
    "int4_packed": Layout(
        "int4",
        {".weight_packed": _WORDS, ".weight_scale": _FLOATS, ".weight_shape": ("I64", "I32")},
        {".weight_zero_point": _WORDS, ".weight_g_idx": _WORDS},
    ),
    # ModelOpt
    "nvfp4": Layout("nvfp4", {".weight": _BYTES, ".weight_scale": ("F8_E4M3",), ".weight_scale_2": ("F32",)}),
    "gptq": Layout("int4", _COLUMNS, {".g_idx": _WORDS}),
    "gptq_v2": Layout("int4", _COLUMNS, {".g_idx": _WORDS}),
    "awq": Layout("int4", _COLUMNS),
}
_SUFFIXES = {suffix for layout in LAYOUTS.values() for suffix in (*layout.tensors, *layout.extras)}
_NEEDLESS = {"input_scale", "input_global_scale", "activation_scale", "input_zero_point", "output_scale"}
_NEEDLESS |= {"k_scale", "v_scale", "q_scale", "prob_scale"}


def is_needless(name: str) -> bool:
    """Whether a tensor scales activations or the KV cache, which this build keeps in formats of its own."""
    return name.rpartition(".")[2] in _NEEDLESS


def read_from(quantization: Quantization, headers: Mapping[str, Entry]) -> Quantization:
    """Return what the files hold: of each module the format that its tensors' names, dtypes and shapes make.

    The config only tells what these do not: how large blocks are, and which of its kinds GPTQ is.
    """
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in headers.items():
        module, suffix = _split(name)
        if suffix in _SUFFIXES:
            modules.setdefault(module, {})[suffix] = entry
    found = {module: _read_module(quantization, module, tensors) for module, tensors in modules.items()}
    return replace(quantization, modules={module: each for module, each in found.items() if each is not None})


def _split(name: str) -> tuple[str, str]:
    module, dot, last = name.rpartition(".")
    for suffix in ("_blocks", "_scales"):
        if last.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return module, dot + last


def _read_module(quantization: Quantization, module: str, tensors: Mapping[str, Entry]) -> Stored | str | None:
    """The format of a module, None where it is plain, or why it has none."""
    if (weight := tensors.get(".weight")) is not None and weight.dtype in _FLOATS:
        return None
    hints: dict[str, Stored] = {}
    for _, stored in quantization.groups:
        hints.setdefault(stored.format, stored)
    for key, layout in LAYOUTS.items():
        hint = hints.get(layout.format)
        if _fits(layout, tensors) and (found := _READERS[layout.format](key, tensors, hint)) is not None:
            return found
    held = ", ".join(f"{suffix} {entry.dtype} {list(entry.shape)}" for suffix, entry in sorted(tensors.items()))
    path = next(iter(tensors.values())).path
    return f"{path}: {module} has {held}, which is no layout of a quantised matrix that is known"


def _fits(layout: Layout, tensors: Mapping[str, Entry]) -> bool:
    known = {**layout.tensors, **layout.extras}
    return layout.tensors.keys() <= tensors.keys() <= known.keys() and all(
        entry.dtype in known[suffix] for suffix, entry in tensors.items()
    )


def _fp8(key: str, tensors: Mapping[str, Entry], hint: Stored | None) -> Stored | None:
    numbers, scales = (tensors[suffix].shape for suffix in LAYOUTS[key].tensors)
    if prod(scales) == 1:
        return Stored("fp8", (0, 0), layout=key)
    if len(numbers) != 2:
        return None
    if scales in {numbers[:1], (numbers[0], 1)}:
        return Stored("fp8", (1, 0), layout=key)
    if len(scales) == 4:  # ModelOpt: [rows, 1, columns, 1]
        scales = scales[::2] if scales[1::2] == (1, 1) else ()
    hints = hint.block if hint else (128, 128)
    sizes = tuple(map(_block, scales, numbers, hints)) if len(scales) == 2 else (None, None)
    return None if None in sizes else Stored("fp8", (sizes[0] or 0, sizes[1] or 0), layout=key)


def _mxfp4(key: str, tensors: Mapping[str, Entry], hint: Stored | None) -> Stored | None:  # noqa: ARG001
    return Stored("mxfp4", (1, 32), layout=key)


def _nvfp4(key: str, tensors: Mapping[str, Entry], hint: Stored | None) -> Stored | None:  # noqa: ARG001
    return Stored("nvfp4", (1, 16), layout=key)


def _int4(key: str, tensors: Mapping[str, Entry], hint: Stored | None) -> Stored | None:
    numbers, scales = (tensors[suffix] for suffix in LAYOUTS[key].tensors if suffix not in {".qzeros", ".weight_shape"})
    if len(numbers.shape) != 2 or len(scales.shape) != 2:
        return None
    group = hint.block[1] if hint else 128
    if key == "int4_packed":  # [out, in/8], [out, groups]
        size = _block(scales.shape[1], 8 * numbers.shape[1], group)
        zeros, ordered = ".weight_zero_point" in tensors, ".weight_g_idx" in tensors
    elif key == "awq":  # [in, out/8], [groups, out]
        size = _block(scales.shape[0], numbers.shape[0], group) if scales.shape[1] == 8 * numbers.shape[1] else None
        zeros, ordered = True, False
    else:  # [in/8, out], [groups, out]; only the config knows which version it is
        known = hint is not None and hint.layout == key and scales.shape[1] == numbers.shape[1]
        size = _block(scales.shape[0], 8 * numbers.shape[0], group) if known else None
        zeros, ordered = True, hint is not None and hint.groups and ".g_idx" in tensors
    return None if size is None else Stored("int4", (1, size), zeros, ordered, scales.dtype, key)


_READERS: dict[str, Callable[[str, Mapping[str, Entry], Stored | None], Stored | None]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "int4": _int4,
}


def _block(count: int, length: int, hint: int) -> int | None:
    """The size of the blocks of which `count` cover `length`: all, the config's, a common one, or an even part."""
    if count == 1:
        return 0
    sizes = (hint, 128, 64, 32, length // max(count, 1))
    return next((size for size in sizes if size and -(-length // size) == count), None)
