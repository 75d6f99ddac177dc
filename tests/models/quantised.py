"""Writers of quantised checkpoints, made from the descriptions of their layouts: numpy, apart from what reads them.

A writer takes a matrix float32 [n, k] and gives the tensors of its module by suffix, and the matrix that they mean:
number · (scale · global scale), each product in float32.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: where the outputs 0…7 of a word come from


def e4m3(code):
    """What a byte of float8_e4m3fn is: a sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


E4M3 = np.float32([e4m3(code) for code in range(256)])
_FINITE = np.flatnonzero(np.isfinite(E4M3))


def nearest(values, table):
    """The index of the entry of a table that is nearest to each value."""
    order = np.argsort(table, kind="stable")
    edges = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(edges, values)]


def to_e4m3(values):
    """Codes uint8, and what they are."""
    codes = _FINITE[nearest(values, E4M3[_FINITE])].astype(np.uint8)
    return codes, E4M3[codes]


def to_e2m1(values):
    codes = nearest(values, E2M1[[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]])
    codes = np.where(codes > 7, codes + 1, codes)
    return codes, E2M1[codes]


def bf16(values):
    """Values as bfloat16 can hold them."""
    return torch.from_numpy(np.float32(values)).bfloat16().float().numpy()


def blocks_of(matrix, rows, columns):
    """The largest magnitude in each block, and each entry's block: [⌈n/rows⌉, ⌈k/columns⌉], two index arrays."""
    n, k = matrix.shape
    rows, columns = rows or n, columns or k
    at = np.arange(n)[:, None] // rows, np.arange(k)[None, :] // columns
    largest = np.zeros((at[0].max() + 1, at[1].max() + 1), np.float32)
    np.maximum.at(largest, at, np.abs(matrix))
    return largest, at


def fp8_dtype(codes):
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def pairs(codes):
    """Bytes of 4-bit codes [.., k]: the even column in the low half."""
    return torch.from_numpy((codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8))


def words(codes, order=range(8)):
    """int32 words of 8 codes of the last dimension: bits 4j…4j+3 hold code order[j]; missing ones are 0."""
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], -codes.shape[-1] % 8), codes.dtype)], axis=-1)
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for word in range(out.shape[-1]):
        for place, source in enumerate(order):
            out[..., word] |= codes[..., 8 * word + source].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(out.view(np.int32))


def fp8(matrix, block, name, *, dtype=torch.float32, shape=None, extras=()):
    largest, at = blocks_of(matrix, *block)
    scales = np.float32(largest / 448)
    scales = bf16(scales) if dtype == torch.bfloat16 else scales
    codes, numbers = to_e4m3(matrix / scales[at])
    stored = torch.from_numpy(scales).to(dtype).reshape(shape(scales.shape) if shape else scales.shape)
    found = {".weight": fp8_dtype(codes), name: stored}
    return found | {extra: torch.tensor(0.5) for extra in extras}, numbers * scales[at]


def mxfp4(matrix, names=(".weight_packed", ".weight_scale")):
    largest, at = blocks_of(matrix, 1, 32)
    exponents = np.floor(np.log2(np.maximum(largest, 1e-30))).astype(int) - 2
    scales = np.float32(2.0) ** exponents.astype(np.float32)
    codes, numbers = to_e2m1(matrix / scales[at])
    return {
        names[0]: pairs(codes),
        names[1]: torch.from_numpy((exponents + 127).astype(np.uint8)),
    }, numbers * scales[at]


def mxfp4_typed(matrix, dtype):
    """Whose scales are bytes of a dtype of their own."""
    tensors, found = mxfp4(matrix)
    return tensors | {".weight_scale": tensors[".weight_scale"].view(dtype)}, found


def mxfp4_stack(matrices):
    """gpt-oss: `_blocks` [E, n, k/32, 16] and `_scales` [E, n, k/32] of matrices [E, n, k]."""
    made = [mxfp4(matrix, ("_blocks", "_scales")) for matrix in matrices]
    tensors = {name: torch.stack([each[name] for each, _ in made]) for name in ("_blocks", "_scales")}
    tensors["_blocks"] = tensors["_blocks"].unflatten(-1, (-1, 16))
    return tensors, np.stack([matrix for _, matrix in made])


def nvfp4_numbers(matrix, total):
    """Codes, the e4m3 scale of each 16, and each entry's number and scale, where all scales are · `total`."""
    largest, at = blocks_of(matrix, 1, 16)
    codes, scales = to_e4m3(np.maximum(largest / 6 / total, 2.0**-9))
    numbers = to_e2m1(matrix / (scales[at] * total))
    return fp8_dtype(codes), numbers, scales, at


def nvfp4_modelopt(matrix):
    total = np.float32(np.abs(matrix).max() / (6 * 448) * 1.37)
    scale_codes, (codes, numbers), scales, at = nvfp4_numbers(matrix, total)
    tensors = {".weight": pairs(codes), ".weight_scale": scale_codes, ".weight_scale_2": torch.tensor(total)}
    return tensors | {".input_scale": torch.tensor(0.01)}, numbers * np.float32(scales * total)[at]


def nvfp4_compressed(matrix):
    divisor = np.float32(6 * 448 / np.abs(matrix).max() / 1.37)
    scale_codes, (codes, numbers), scales, at = nvfp4_numbers(matrix, np.float32(1) / divisor)
    tensors = {".weight_packed": pairs(codes), ".weight_scale": scale_codes}
    tensors |= {".weight_global_scale": torch.tensor([divisor]), ".input_global_scale": torch.tensor([7.0])}
    return tensors, numbers * np.float32(scales / divisor)[at]


def integers(matrix, group, *, zeros, order=None, lowest=0):
    """4-bit numbers of a matrix, scales and zeros [n, groups], its values, and the group of each input."""
    n, k = matrix.shape
    columns = np.arange(k) // (group or k) if order is None else order
    count = columns.max() + 1
    low, high = (np.zeros((n, count), np.float32) for _ in range(2))
    for column in range(k):
        low[:, columns[column]] = np.minimum(low[:, columns[column]], matrix[:, column])
        high[:, columns[column]] = np.maximum(high[:, columns[column]], matrix[:, column])
    if zeros:
        scales = np.float32(np.float16((high - low) / 15))
        middle = np.clip(np.round(-low / scales), lowest, 15).astype(int)
    else:
        scales, middle = np.float32(np.float16(np.maximum(high, -low) / 7.5)), np.full((n, count), 8)
    numbers = np.clip(np.round(matrix / scales[:, columns]) + middle[:, columns], 0, 15).astype(int)
    return numbers, scales, middle, np.float32(numbers - middle[:, columns]) * scales[:, columns], columns


def int4_compressed(matrix, group, *, zeros=False, order=None):
    numbers, scales, middle, found, _ = integers(matrix, group, zeros=zeros, order=order)
    tensors = {
        ".weight_packed": words(numbers),
        ".weight_scale": torch.from_numpy(scales).half(),
        ".weight_shape": torch.tensor(matrix.shape),
    }
    if zeros:  # packed along the outputs
        tensors[".weight_zero_point"] = words(middle.T).T.contiguous()
    if order is not None:
        tensors[".weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    return tensors, found


def gptq(matrix, group, *, less=1, zeros=True, order=None):
    """Words along the inputs; zeros `less` one, along the outputs."""
    numbers, scales, middle, found, columns = integers(matrix, group, zeros=zeros, order=order, lowest=1)
    return {
        ".qweight": words(numbers).T.contiguous(),
        ".qzeros": words(middle.T - less),
        ".scales": torch.from_numpy(scales.T.copy()).half(),
        ".g_idx": torch.from_numpy(columns.astype(np.int32)),
    }, found


def awq(matrix, group):
    """Words along the outputs, in their own order."""
    numbers, scales, middle, found, _ = integers(matrix, group, zeros=True)
    return {
        ".qweight": words(numbers.T, AWQ_ORDER),
        ".qzeros": words(middle.T, AWQ_ORDER),
        ".scales": torch.from_numpy(scales.T.copy()).half(),
    }, found


def shuffled(count, group):
    """Groups of inputs in an activation order: the same for all matrices of as many inputs."""
    return np.random.default_rng(count).permutation(np.arange(count) // group)


@dataclass
class Layout:
    """A writer, what a config says of it, and which tensors stand beside the matrices."""

    write: object
    config: dict
    beside: tuple[str, ...] = ()
    older: dict | None = field(default=None)  # hf_quant_config.json


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def modelopt(algorithm):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "*mlp.gate"]}


def _fp8_group(**weights):
    return compressed("float-quantized", num_bits=8, type="float", symmetric=True, **weights)


def _int_group(**weights):
    return compressed("pack-quantized", num_bits=4, type="int", **weights)


def _gptq_config(**fields):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, **fields}


BLOCK = (48, 40)  # ragged in the shrunken models
LAYOUTS = {
    "fp8-deepseek": Layout(
        lambda m: fp8(m, BLOCK, ".weight_scale_inv"),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
    ),
    "fp8-mistral": Layout(
        lambda m: fp8(m, (0, 0), ".weight_scale_inv", shape=lambda _: (), extras=(".activation_scale",)),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "fp8-tensor": Layout(
        lambda m: fp8(m, (0, 0), ".weight_scale", dtype=torch.bfloat16, shape=lambda _: (1,)),
        _fp8_group(strategy="tensor"),
    ),
    "fp8-channel": Layout(
        lambda m: fp8(m, (1, 0), ".weight_scale", dtype=torch.bfloat16), _fp8_group(strategy="channel")
    ),
    "fp8-block": Layout(
        lambda m: fp8(m, BLOCK, ".weight_scale", dtype=torch.bfloat16),
        _fp8_group(strategy="block", block_structure=list(BLOCK)),
    ),
    "fp8-fbgemm": Layout(
        lambda m: fp8(m, (1, 0), ".weight_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
    "fp8-modelopt": Layout(
        lambda m: fp8(m, (0, 0), ".weight_scale", shape=lambda _: (), extras=(".input_scale",)),
        modelopt("FP8"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ),
    "fp8-modelopt-channel": Layout(
        lambda m: fp8(m, (1, 0), ".weight_scale", shape=lambda s: s[:1]), modelopt("FP8_PER_CHANNEL_PER_TOKEN")
    ),
    "fp8-modelopt-block": Layout(
        lambda m: fp8(m, (128, 128), ".weight_scale", shape=lambda s: (s[0], 1, s[1], 1)), modelopt("FP8_PB_WO")
    ),
    "mxfp4-compressed": Layout(
        mxfp4, compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
    ),
    "mxfp4-compressed-e8m0": Layout(
        lambda m: mxfp4_typed(m, torch.float8_e8m0fnu),
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "nvfp4-modelopt": Layout(nvfp4_modelopt, modelopt("NVFP4")),
    "nvfp4-modelopt-older": Layout(
        nvfp4_modelopt,
        {},
        ("self_attn.k_scale", "self_attn.v_scale"),
        {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}},
    ),
    "nvfp4-compressed": Layout(
        nvfp4_compressed,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
    "int4-compressed": Layout(lambda m: int4_compressed(m, 32), _int_group(strategy="group", group_size=32)),
    "int4-compressed-channel": Layout(lambda m: int4_compressed(m, 0), _int_group(strategy="channel")),
    "int4-compressed-zeros": Layout(
        lambda m: int4_compressed(m, 16, zeros=True), _int_group(strategy="group", group_size=16, symmetric=False)
    ),
    "int4-compressed-order": Layout(
        lambda m: int4_compressed(m, 32, order=shuffled(m.shape[1], 32)),
        _int_group(strategy="group", group_size=32, actorder="group"),
    ),
    "gptq": Layout(lambda m: gptq(m, 32), _gptq_config()),
    "gptq-symmetric": Layout(lambda m: gptq(m, 32, zeros=False), _gptq_config(sym=True)),
    "gptq-v2": Layout(lambda m: gptq(m, 32, less=0), _gptq_config(checkpoint_format="gptq_v2")),
    "gptq-order": Layout(lambda m: gptq(m, 32, order=shuffled(m.shape[1], 32)), _gptq_config(desc_act=True)),
    "gptq-channel": Layout(lambda m: gptq(m, 0), _gptq_config(group_size=-1)),
    "awq": Layout(
        lambda m: awq(m, 32),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ),
}
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def write_modules(folder: Path, layout: str, matrices, **config):
    """Write a folder with nothing but modules {name: matrix}; return what their matrices mean."""
    made = {name: LAYOUTS[layout].write(matrix) for name, matrix in matrices.items()}
    tensors = {name + suffix: each for name, (own, _) in made.items() for suffix, each in own.items()}
    write_folder(folder, tensors, {"quantization_config": LAYOUTS[layout].config or None, **config})
    return {name: matrix for name, (_, matrix) in made.items()}


def write_folder(folder: Path, tensors, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def quantise(source: Path, layout: str, quantised: Path, plain: Path):
    """Write the model of a plain folder in a layout, and once more in float32 with the matrices that it then has."""
    chosen, tensors = LAYOUTS[layout], load_file(source / "model.safetensors")
    made, meant = {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and "_proj" in module.rpartition(".")[2]:
            own, matrix = chosen.write(tensor.float().numpy())
            made |= {module + suffix: each for suffix, each in own.items()}
            meant[name] = torch.from_numpy(matrix)
        else:
            made[name] = meant[name] = tensor
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    made |= {f"model.layers.{layer}.{name}": torch.tensor(1.0) for layer in range(layers) for name in chosen.beside}
    _write_pair(source, made, meant, chosen.config, quantised, plain)
    if chosen.older:
        (quantised / "hf_quant_config.json").write_text(json.dumps(chosen.older))


def quantise_gpt_oss(source: Path, quantised: Path, plain: Path):
    """The same for gpt-oss: its experts in MXFP4, as OpenAI has them; transformers writes them [E, in, out]."""
    made, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            own, matrices = mxfp4_stack(tensor.float().transpose(1, 2).numpy())
            made |= {name + suffix: each for suffix, each in own.items()}
            meant[name] = torch.from_numpy(matrices).transpose(1, 2)
        else:
            made[name] = meant[name] = tensor
    _write_pair(source, made, meant, GPT_OSS, quantised, plain)


def _write_pair(source, made, meant, scheme, quantised, plain):
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, extra in ((quantised, made, {"quantization_config": scheme}), (plain, meant, {})):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        write_folder(folder, tensors, config | (extra if scheme else {}))
