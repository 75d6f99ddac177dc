"""Writers of quantised matrices, made from the descriptions of their layouts: numpy, apart from what reads them.

A writer takes a matrix float32 [n, k] and gives the tensors of its module by suffix, and the matrix that they mean:
number · (scale · global scale), each product in float32.
"""

import numpy as np
import torch

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
