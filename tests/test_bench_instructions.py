"""Instructions a weight: the table is of the kernels that there are, within budgets, and what a disassembly shows."""

import json

import instructions
import pytest

from fwd.kernels.builds import ARCHES
from fwd.kernels.jit import Jit

# Multiprocessors · 128 · clock / weights a second, rounded: see the research of issue 6.
BUDGETS = {
    "sm_90a": {"bf16": 12.4, "fp8": 6.2, "mxfp4": 3.3, "nvfp4": 3.5, "int4_32": 3.7, "int4_128": 3.3},
    "sm_100a": {"bf16": 9.1, "fp8": 4.6, "mxfp4": 2.4, "nvfp4": 2.6, "int4_32": 2.7, "int4_128": 2.4},
}
# What kernels take of that at most, of any format and rows. A B200 reads four bits faster than they become bf16.
SHARE = {
    "sm_90a": {"gemv": 1.0, "qkv": 1.0, "experts": 1.0, "latent_qkv": 1.0},
    "sm_100a": {"gemv": 1.3, "qkv": 1.3, "experts": 1.45, "latent_qkv": 1.25},
}
SASS = """
		Function : linear_1x8
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   S2R R0, SR_TID.X ;                       /* 0x0000000000007919 */
                                                                            /* 0x000fe20000000800 */
        /*0010*/              @!P1 BRA 0x70 ;                               /* 0x0000000000007919 */
        /*0020*/                   LOP3.LUT R5, R20, 0x81c081c0, RZ, 0xc0, !PT ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R16, R8 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R18, R8 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/               @P2 BRA 0x0 ;
        /*0070*/                   BRA 0x70;
"""


@pytest.fixture(scope="module")
def table():
    return json.loads(instructions.TABLE.read_text())


def test_the_table_is_of_the_kernels_that_stream_weights(table):
    names = {source: set(kernels) for source, kernels in instructions.wanted().items()}
    assert set(table) == set(ARCHES)
    for arch in ARCHES:
        found = {source: set(kernels) for source, kernels in table[arch].items()}
        assert found == names, "run bench/instructions.py --write"


@pytest.mark.parametrize("arch", ARCHES)
def test_budgets_are_those_of_the_cards(arch):
    for name, most in BUDGETS[arch].items():
        assert instructions.budget(arch, instructions.BITS[name]) == pytest.approx(most, abs=0.06)


@pytest.mark.parametrize("family", instructions.FAMILIES)
@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_take_what_is_issued_while_weights_are_read(arch, family, table):
    files = {source: kernels for source, kernels in table[arch].items() if instructions.family_of(source) == family}
    assert len(files) == len(instructions.BITS), "a file for each format"
    for source, kernels in files.items():
        most = BUDGETS[arch][instructions.format_of(source)] * SHARE[arch][family]
        for kernel, count in kernels.items():
            assert count <= most, f"{arch} {source} {kernel}: {count} of {most:.2f}"


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4_128"])
def test_four_bits_of_eight_rows_keep_up_with_a_b200(table, name):
    for family in ("gemv", "qkv"):
        for kernel, count in table["sm_100a"][f"{family}_{name}.cu"].items():
            assert kernel.endswith("16") or count <= BUDGETS["sm_100a"][name], f"{family} {kernel}"


def test_the_innermost_loop_of_products_is_counted():
    body = instructions.loop(SASS)
    assert [line.split()[0] for line in body] == ["LOP3.LUT", "HMMA.16816.F32.BF16", "HMMA.16816.F32.BF16", "@P0"]
    assert instructions.per_weight("linear_1x8", body) == 4 / 16
    assert instructions.per_weight("linear_1x16", body) == 4 / 8
    assert instructions.loop("nothing") == []


def test_a_loop_around_the_main_one_is_not_counted_for_what_else_it_holds():
    product = "HMMA.16816.F32.BF16 R8, R4, R16, R8"
    lines = [product, product, "@P0 BRA 0x0", product, "@P1 BRA 0x30", "@P2 BRA 0x0"]
    text = "\n".join(f"        /*{16 * at:04x}*/    {line} ;" for at, line in enumerate(lines))
    assert instructions.loop(text) == lines[:3]


def test_files_are_known_by_their_family_and_format():
    files = ("gemv.cu", "qkv_int4_128.cu", "experts_bf16.cu", "latent_qkv_fp8.cu")
    assert [instructions.format_of(file) for file in files] == ["bf16", "int4_128", "bf16", "fp8"]
    assert [instructions.family_of(file) for file in files] == ["gemv", "qkv", "experts", "latent_qkv"]


def test_the_table_is_what_a_disassembly_shows(request, table):
    if (disassembler := instructions.tool()) is None:
        pytest.skip(f"{instructions.TOOL} is not here: set CUDA_HOME, or install triton")
    found = instructions.counts(Jit(request.config.cache.mkdir("fwd")), disassembler)
    for arch, files in found.items():
        for source, kernels in files.items():
            for kernel, count in kernels.items():
                told = table[arch][source][kernel]
                apart = f"{arch} {source} {kernel}: {count}, {told} in the table: run bench/instructions.py --write"
                assert count == pytest.approx(told, rel=instructions.MARGIN), apart
