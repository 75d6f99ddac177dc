"""Products with weights as they are stored: right, and with the same bits in any company."""

import random
from functools import partial

import pytest
import torch
from agreement import difference, same_bits
from blocks import SHAPES, Block, decode_rows, scattered_tables
from weights import FORMATS, quantised

from fwd.kernels import products
from fwd.kernels.products import by_whole_rows, product
from fwd.kernels.qtensor import QTensor

WIDE = [(7, 64), (33, 96), (301, 250), (129, 1030), (520, 2880)]


def weight_of(form, outputs, inputs):
    if form == "bf16":
        matrix = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
        return QTensor.plain(matrix.bfloat16())
    return quantised(form, outputs, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", WIDE, ids=str)
@pytest.mark.parametrize("form", [*FORMATS, "bf16"])
def test_a_row_has_the_same_bits_in_any_company(form, shape, dtype):
    weight, chance = weight_of(form, *shape), random.Random(1)
    x = torch.randn(64, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = product(x, weight)
    assert whole.dtype == torch.float32
    exact = x.double() @ weight.dequantize().double().t()
    assert difference(whole, exact) < 1e-12
    for count in (1, 2, 3, 4, 7, 15, 16, 17, 33, 64):
        order = chance.sample(range(64), count)
        assert same_bits(product(x[order], weight), whole[order]), (form, shape, dtype, count)
    assert same_bits(product(x[5:10], weight), whole[5:10])  # that begin somewhere in memory


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "int4"])
def test_slabs_bound_what_is_dequantised_at_once(form, monkeypatch):
    weight = quantised(form, 301, 256)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    expected, seen = product(x, weight), []
    monkeypatch.setattr(products, "SLAB_BYTES", 40 * 4 * 256)
    right = QTensor.dequantize

    def watched(self, outputs=slice(None)):
        seen.append(len(range(*outputs.indices(self.shape[0]))))
        return right(self, outputs)

    monkeypatch.setattr(QTensor, "dequantize", watched)
    torch.testing.assert_close(product(x, weight), expected, atol=1e-4, rtol=1e-5)
    assert max(seen) == 32
    assert sum(seen) == 301


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [37, 344, 2880, 33_000])
def test_an_elementwise_function_gives_a_row_the_same_bits_in_any_company(width, threads, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    gate, _ = torch.randn(200, 2 * width, generator=torch.Generator().manual_seed(4)).chunk(2, dim=1)
    alone = torch.stack([torch.sigmoid(row) for row in gate])
    for count in (1, 4, 16, 20, 200):
        assert same_bits(by_whole_rows(torch.sigmoid, gate[-count:]), alone[-count:]), count


class Quantised(Block):
    """A decoder block whose matrices are quantised, as far as their widths allow."""

    form = "fp8"

    def matrix(self, *shape):
        form = self.form if shape[1] % 2 == 0 else "fp8"
        self.made = getattr(self, "made", 0) + 1
        return self.ops.pack(quantised(form, *shape, seed=self.seed + self.made))

    def __post_init__(self):
        super().__post_init__()
        self.head = self.ops.pack_head(self.matrix(301, self.shape[0]))

    def random(self, *shape):
        return super().random(*shape) * 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("form", ["fp8", "nvfp4", "int4-zeros"])
def test_a_block_of_quantised_weights_keeps_the_bits_of_a_row(form, shape, dtype, monkeypatch):
    monkeypatch.setattr(Quantised, "form", form)
    block, chance = Quantised(shape, dtype, seed=1), random.Random(2)
    tables, hidden = scattered_tables(16, 8, seed=3), block.random(16, shape[0])
    kv = block.cache(16 * 8)
    alone = [block.run(hidden[i : i + 1], decode_rows([(i, 0)], tables), kv) for i in range(16)]
    for count in (2, 3, 5, 9, 16):
        order = chance.sample(range(16), count)
        together = block.run(hidden[order], decode_rows([(i, 0) for i in order], tables), kv)
        for row, index in enumerate(order):
            assert same_bits(together[row : row + 1], alone[index]), (form, shape, dtype, count, row)


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "int4-zeros"])
def test_ops_round_the_exact_product_once(form, monkeypatch):
    monkeypatch.setattr(Quantised, "form", form)
    block = Quantised(SHAPES[0], torch.bfloat16, seed=5)
    x, residual, bias = block.random(4, 64), block.random(4, 64), block.random(64)
    found = block.ops.linear(x, block.output, residual.clone(), bias)
    exact = x.double() @ block.output.dequantize().double().t() + bias.double() + residual.double()
    assert found.dtype == torch.bfloat16
    assert (found == exact.bfloat16()).float().mean() > 0.99  # but where a float32 sum falls on the other side of a tie
    logits = block.ops.head(x, block.last_norm, block.head)
    assert logits.dtype == torch.float32
