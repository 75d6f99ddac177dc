"""Quantised weights in each form that kernels have, with the name that kernels have for it."""

from dataclasses import replace

from weights import quantised

# What `weights.quantised` makes, in a block where a format has several, and the kernels' name of it.
FORMS = {
    "fp8-tensor": ("fp8", (10_000, 10_000), "fp8"),
    "fp8-channel": ("fp8", (1, 10_000), "fp8"),
    "fp8-block": ("fp8", (128, 128), "fp8"),
    "fp8-low-block": ("fp8", (8, 256), "fp8"),
    "mxfp4": ("mxfp4", None, "mxfp4"),
    "nvfp4": ("nvfp4", None, "nvfp4"),
    "int4": ("int4", None, "int4_32"),
    "int4-zeros": ("int4-zeros", None, "int4_32"),
    "int4-128": ("int4-zeros", (1, 128), "int4_128"),
}


def made(form, *shape, seed=0):
    """A weight in one of FORMS; its inputs are groups of 32 where they are int4."""
    name, block, _ = FORMS[form]
    if name == "fp8" or block is None:
        return quantised(name, *shape, block=block, seed=seed)
    weight, columns = quantised(name, *shape, seed=seed), -(-shape[-1] // block[1])
    scales, zeros = (each[..., :columns].contiguous() for each in (weight.scales, weight.zeros))
    return replace(weight, block=block, scales=scales, zeros=zeros)


def damped(form, *shape, seed=0):
    """The same so that sums over the inputs are near 1."""
    weight = made(form, *shape, seed=seed)
    if weight.format == "mxfp4":
        return replace(weight, scales=weight.scales - 8)
    if weight.format == "nvfp4":
        return replace(weight, outer=weight.outer / 64)
    scales = (weight.scales.float() / 64).to(weight.scales.dtype)
    return replace(weight, scales=scales)
