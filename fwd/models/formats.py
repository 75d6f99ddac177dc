"""Quantised matrices as files hold them → QTensor: one small function for each layout of `quantization.LAYOUTS`.

Layouts as those who write them document and read them: DeepSeek-V3 (README_WEIGHTS.md), gpt-oss (torch/weights.py),
compressed-tensors (compressors/), NVIDIA ModelOpt (torch/quantization/qtensor/), GPTQModel (qlinear), AutoAWQ
(utils/packing_utils.py). Scales of activations and of the KV cache are not read: see `quantization.is_needless`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels.qtensor import QTensor, concat, fold, joined
from fwd.models.modules import Modules
from fwd.models.quantization import LAYOUTS, Quantization, Stored
from fwd.models.source import Source

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of a word that holds each of its 8 outputs


def linear(
    checkpoint: Source, quantization: Quantization, modules: Sequence[str], outputs: Sequence[int], inputs: int
) -> QTensor | None:
    """Return the matrices [outputs[i], inputs] of modules one above the other; None where they are plain.

    Raises ModelError for parts of different formats and whatever is wrong with their tensors.
    """
    stored = _common(checkpoint, quantization, modules, inputs)
    if stored is None:
        return None
    alike = Modules(checkpoint, modules, stored[0], outputs[0], inputs)
    if len(set(outputs)) == 1:
        return _folded(alike, len(modules)).expert(0)
    parts = [
        _read(Modules(checkpoint, (name,), each, height, inputs)).expert(0)
        for name, each, height in zip(modules, stored, outputs, strict=True)
    ]
    if orders := [part.groups.unsqueeze(0) for part in parts if part.groups is not None]:
        alike.check_order(joined(orders), len(modules))
    return concat(parts)


def experts(
    checkpoint: Source, quantization: Quantization, modules: Sequence[Sequence[str]], outputs: int, inputs: int
) -> QTensor | None:
    """Return [experts, parts·outputs, inputs]: the matrices [outputs, inputs] of each expert's modules, as `linear`."""
    names = [name for own in modules for name in own]
    stored = _common(checkpoint, quantization, names, inputs)
    if stored is None:
        return None
    return _folded(Modules(checkpoint, names, stored[0], outputs, inputs), len(modules[0]))


def stacked(
    checkpoint: Source, quantization: Quantization, module: str, shape: tuple[int, int, int], order: Tensor
) -> QTensor | None:
    """Return the matrices of `shape` [experts, outputs, inputs] of a module that holds all experts of a layer.

    Outputs come in an `order` of the tensors', int64 [outputs]. None where the module is plain.
    """
    experts, outputs, inputs = shape
    stored = quantization.format_of(module)
    if stored is None:
        return None
    found = _mxfp4_blocks(Modules(checkpoint, (module,), stored, outputs, inputs), experts)
    for expert in () if found.data.is_meta else range(experts):  # one by one: a second copy of all would be a gigabyte
        one = found.expert(expert)
        placed = one.rows(order)
        for into, rows in zip(one.tensors(), placed.tensors(), strict=True):
            into.copy_(rows)
    return found


def drop_biases(checkpoint: Source, quantization: Quantization) -> None:
    """Take the biases that writers of GPTQ give to all matrices, where a model has none: they are zero.

    Raises ModelError for one that is not.
    """
    for name in checkpoint.left():
        stored = (quantization.modules or {}).get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if isinstance(stored, Stored) and stored.layout in {"gptq", "gptq_v2"}:
            found = checkpoint.raw(name).unsqueeze(0)
            if any(values.any() for _, values in checkpoint.values((name,), found)):
                path = checkpoint.entries[name].path
                raise ModelError(f"{path}: {name} is not zero, but this architecture has no such bias")


def _common(checkpoint: Source, quantization: Quantization, modules: Sequence[str], inputs: int) -> list[Stored] | None:
    """The format of each of some modules, which is the same but for the heights of its blocks; None: all plain."""
    stored = [quantization.format_of(module) for module in modules]
    kinds = [each and (each.layout, each.block[1] or inputs, each.zeros, each.groups, each.scale) for each in stored]
    other = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), 0)
    if other:
        first, second = (_described(stored[index]) for index in (0, other))
        raise ModelError(
            f"{checkpoint.folder}: {modules[0]} is {first}, {modules[other]} {second}: "
            "they are one matrix here, of one format"
        )
    found = [each for each in stored if each is not None]
    if found and found[0].format in {"mxfp4", "nvfp4", "int4"} and inputs % 2:
        raise ModelError(
            f"{checkpoint.folder}: {modules[0]} has {inputs} inputs, so that 4-bit numbers do not make whole bytes"
        )
    return found or None


def _described(stored: Stored | None) -> str:
    if stored is None:
        return "plain"
    traits = [name for name in ("zeros", "groups") if getattr(stored, name)]
    return f"{stored.format} ({', '.join([stored.layout, f'scales of {stored.block[1] or 1}', *traits])})"


def _read(modules: Modules) -> QTensor:
    """Return the matrices of modules: [modules, outputs, inputs]."""
    return _READERS[modules.stored.layout](modules)


def _folded(modules: Modules, parts: int) -> QTensor:
    """Return the matrices of modules, `parts` at a time one above the other."""
    found = _read(modules)
    if found.groups is not None:
        modules.check_order(found.groups, parts)
    return fold(found, parts)


def _ceil(length: int, size: int) -> int:
    return -(-length // (size or length))


def _fp8(modules: Modules) -> QTensor:
    _, suffix = LAYOUTS[modules.stored.layout].tensors
    n, k, block = modules.outputs, modules.inputs, modules.stored.block
    data = modules.take(".weight", (n, k))
    rows, columns = _ceil(n, block[0]), _ceil(k, block[1])
    shapes: list[tuple[int, ...]] = [(rows, columns), (rows, 1, columns, 1)]
    shapes += [(rows,)] if columns == 1 else []
    shapes += [()] if rows == columns == 1 else []
    return modules.matrix(data, modules.scales(suffix, *shapes).float().view(-1, rows, columns))


def _mxfp4_blocks(modules: Modules, experts: int) -> QTensor:
    """gpt-oss: the experts of a layer in one tensor, 16 bytes a block."""
    n, columns = modules.outputs, _ceil(modules.inputs, 32)
    name = f"{modules.checkpoint.folder}: {modules.names[0]}"
    if modules.stored.layout != "mxfp4_blocks":
        raise ModelError(f"{name} is {_described(modules.stored)}: experts in one tensor are mxfp4 or plain")
    if modules.inputs % 32:
        raise ModelError(f"{name} has {modules.inputs} inputs, which do not make whole blocks of 32")
    data = modules.take("_blocks", (experts, n, columns, 16))[0].view(experts, n, -1)
    return modules.matrix(data, modules.powers("_scales", (experts, n, columns))[0])


def _mxfp4_packed(modules: Modules) -> QTensor:
    n, k = modules.outputs, modules.inputs
    data = modules.take(".weight_packed", (n, k // 2))
    return modules.matrix(data, modules.powers(".weight_scale", (n, _ceil(k, 32))))


def _nvfp4(modules: Modules) -> QTensor:
    """ModelOpt: the global scale multiplies."""
    return _nvfp4_of(modules, ".weight", ".weight_scale_2", divides=False)


def _nvfp4_packed(modules: Modules) -> QTensor:
    """compressed-tensors: the global scale divides."""
    return _nvfp4_of(modules, ".weight_packed", ".weight_global_scale", divides=True)


def _nvfp4_of(modules: Modules, numbers: str, factor: str, *, divides: bool) -> QTensor:
    n, k = modules.outputs, modules.inputs
    data = modules.take(numbers, (n, k // 2))
    scales = modules.scales(".weight_scale", (n, _ceil(k, 16)))
    return modules.matrix(data, scales, outer=modules.outer(factor, divides=divides), divides=divides)


def _int4_packed(modules: Modules) -> QTensor:
    """compressed-tensors: words of 8 inputs, the first in the lowest bits; words of zeros hold 8 outputs."""
    n, k = modules.outputs, modules.inputs
    columns = _ceil(k, modules.stored.block[1])
    shapes = modules.take(".weight_shape", (2,))
    modules.check(".weight_shape", shapes, {f"is not [{n}, {k}]": lambda found: found != torch.tensor([n, k])})
    data = modules.take(".weight_packed", (n, _ceil(k, 8))).view(torch.uint8)[..., : k // 2].contiguous()
    scales = modules.scales(".weight_scale", (n, columns), signed=True)
    zeros = None
    if modules.stored.zeros:
        words = modules.take(".weight_zero_point", (_ceil(n, 8), columns))  # [modules, out/8, columns]
        zeros = _turned(_nibbles(_turned(words))[..., :n])
    groups = modules.order(".weight_g_idx", columns) if modules.stored.groups else None
    return modules.matrix(data, scales, zeros=zeros, groups=groups)


def _gptq(modules: Modules) -> QTensor:
    """Words of 8 inputs, of 8 outputs for zeros; version 1 stores zeros less one."""
    n, k = modules.outputs, modules.inputs
    columns = _ceil(k, modules.stored.block[1])
    words = modules.take(".qweight", (_ceil(k, 8), n))  # [modules, in/8, out]
    data = _turned(words).view(torch.uint8)[..., : k // 2].contiguous()
    zeros = _nibbles(modules.take(".qzeros", (columns, _ceil(n, 8))))[..., :n]  # [modules, columns, out]
    zeros = _turned(zeros).add_(modules.stored.layout == "gptq")
    scales = _turned(modules.scales(".scales", (columns, n), signed=True))
    groups = modules.order(".g_idx", columns) if modules.has(".g_idx") else None
    return modules.matrix(data, scales, zeros=zeros, groups=groups)


def _awq(modules: Modules) -> QTensor:
    """Words of 8 outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on."""
    n, k = modules.outputs, modules.inputs
    columns = _ceil(k, modules.stored.block[1])
    words = modules.take(".qweight", (k, _ceil(n, 8)))
    data = words.new_empty((len(words), n, k // 2), dtype=torch.uint8)
    for into, each in (
        () if words.is_meta else zip(data, words, strict=True)
    ):  # one by one: all experts' numbers would be gigabytes
        numbers = _of_awq(each, n)  # [in, out]
        into.copy_((numbers[::2] | numbers[1::2] << 4).t())
    zeros = _turned(_of_awq(modules.take(".qzeros", (columns, _ceil(n, 8))), n))
    scales = _turned(modules.scales(".scales", (columns, n), signed=True))
    return modules.matrix(data, scales, zeros=zeros)


def _turned(tensors: Tensor) -> Tensor:
    """The transposed matrices, row by row."""
    return tensors.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # `contiguous` may keep strides of 1


def _nibbles(words: Tensor) -> Tensor:
    """The 8 nibbles of each int32 word, the lowest first: uint8 [.., 8·words]."""
    pairs = words.view(torch.uint8)
    if pairs.is_meta:  # its arithmetic is slow
        return pairs.new_empty((*pairs.shape[:-1], 2 * pairs.shape[-1]))
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def _of_awq(words: Tensor, outputs: int) -> Tensor:
    nibbles = _nibbles(words)
    return nibbles.view(*words.shape, 8)[..., _AWQ_ORDER].view(nibbles.shape)[..., :outputs]


_READERS: dict[str, Callable[[Modules], QTensor]] = {
    "awq": _awq,
    "fp8": _fp8,
    "fp8_inv": _fp8,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "int4_packed": _int4_packed,
    "mxfp4_packed": _mxfp4_packed,
    "nvfp4": _nvfp4,
    "nvfp4_packed": _nvfp4_packed,
}
