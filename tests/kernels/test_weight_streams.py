"""What the plan counts of packed weights is what they are, and weights of a prefill's products are theirs, rounded."""

import pytest
import torch
from agreement import same_bits
from weights import quantised

from fwd.errors import ModelError
from fwd.kernels import packing, streams
from fwd.kernels.qtensor import QTensor
from fwd.kernels.unpack import unpack

WEIGHTS = {
    "fp8": ("fp8", (128, 128)),
    "fp8 rows": ("fp8", (1, 1 << 20)),
    "fp8 tall": ("fp8", (1 << 20, 256)),
    "mxfp4": ("mxfp4", None),
    "nvfp4": ("nvfp4", None),
    "nvfp4-divides": ("nvfp4-divides", None),
    "int4": ("int4", None),
    "int4-zeros": ("int4-zeros", None),
    "int4 of 128": ("int4", (1, 128)),
}
SHAPES = [(16, 128), (40, 384), (72, 2880), (3, 24, 256)]


def weight_of(name, shape):
    form, block = WEIGHTS[name]
    made = quantised(form, *shape, block=block, seed=sum(shape))
    if name == "int4 of 128":
        made = QTensor(made.data, "int4", made.shape, block=block, scales=made.scales[..., ::4].contiguous())
    return made


def stream_of(weight):
    return streams.stream_of(weight.format, weight.block, weight.shape[-1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_packed_bytes_are_counted(name, shape):
    weight = weight_of(name, shape)
    stream, packed = stream_of(weight), weight.pack()
    assert packing.name_of(packed) == stream
    assert packing.inputs_of(packed) == streams.STREAMS[stream].inputs
    copies = shape[0] if len(shape) == 3 else 1
    assert packed.nbytes == copies * streams.packed_bytes(stream, *shape[-2:])


def test_bfloat16_is_counted():
    assert QTensor.plain(torch.zeros(40, 88).bfloat16()).pack().nbytes == streams.packed_bytes("bf16", 40, 88)


REFUSED = {
    "fp8": [(16, 48), (4, 128)],
    "int4": [(1, 16)],
    "int4-groups": [(1, 32)],
}


@pytest.mark.parametrize(("form", "block"), [(form, block) for form in REFUSED for block in REFUSED[form]])
def test_what_is_refused_is_what_packing_refuses(form, block):
    weight = quantised(form, 32, 256, block=block)
    if block == (1, 16):
        weight = QTensor(weight.data, "int4", weight.shape, block=block, scales=weight.scales.repeat(1, 2))
    ordered = weight.groups is not None
    assert streams.refusal(weight.format, block, 32, 256, ordered=ordered)
    with pytest.raises(ModelError):
        weight.pack()


@pytest.mark.parametrize("name", WEIGHTS)
def test_unpacked_weights_are_the_numbers_rounded(execution, name):
    weight = weight_of(name, (72, 2880))
    if name == "int4 of 128":
        weight = weight_of(name, (72, 2816))
    meant = weight.dequantize()

    def run(launcher):
        packed = weight.pack()
        scratch = launcher.empty((80 * 2944,), torch.bfloat16)
        return [unpack(launcher, packed, part, scratch).clone() for part in (slice(0, 72), slice(24, 40))]

    whole, part = execution.everywhere(run)
    assert same_bits(whole[24:40], part)
    # scales of NVFP4 are multiplied one after the other: the float32 between may round the other way, once in a while
    apart = whole != meant.bfloat16()
    assert apart.float().mean() <= (1e-3 if name.startswith("nvfp4") else 0)
    assert (whole.float() - meant).abs().max() <= meant.abs().max() * 2**-8


def test_a_weight_that_no_kernel_takes_is_rounded_slab_by_slab():
    weight = quantised("int4-groups", 2, 1040, 64)
    assert same_bits(weight.rounded().data, weight.dequantize().bfloat16())
