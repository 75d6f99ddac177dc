"""The one table of builds: every kernel of `cuda/`, and what it may take at most, on every architecture.

A kernel is an `extern "C" __global__` function; `tests/kernels/test_builds.py` holds that table and sources name the
same ones, that no build spills or takes static shared memory, and that none takes more registers than stand here. The
launchers refuse a launch with more dynamic shared memory.
"""

from typing import NamedTuple

ARCHES = ("sm_90a", "sm_100a")  # H100 and H200; B200
MAX_BUILDS = 230  # kernels × arches: what a first start without a cache has to compile; six formats of each product
SHARED_LIMIT = 232448  # bytes of dynamic shared memory that a block can have


class Bound(NamedTuple):
    """What a kernel takes at most."""

    registers: int  # a thread
    shared: int = 0  # bytes of dynamic shared memory a block


_STAGED = Bound(128, SHARED_LIMIT)  # as many normed rows as fit
_QUANTISED = {
    "linear_1x8": Bound(128, 10240),
    "linear_1x16": Bound(128, 20480),
    "gate_up_8": _STAGED,
    "gate_up_16": _STAGED,
}
_WHOLE = {"qkv_whole_8": _STAGED, "qkv_whole_16": _STAGED}
_UNPACK = Bound(64)
_DOWN, _QUERY = Bound(128, SHARED_LIMIT), Bound(232, SHARED_LIMIT)

BUILDS: dict[str, dict[str, Bound]] = {  # file in `cuda/` → kernel
    "gemv.cu": {
        "embed": Bound(32),
        "linear_1x8": Bound(128, 10240),
        "linear_1x16": Bound(128, 20480),
        "linear_2x8": Bound(128, 20480),
        "linear_2x16": Bound(255, 40960),
        "gate_up_8": _STAGED,
        "gate_up_16": _STAGED,
        "head_8": _STAGED,
        "head_16": _STAGED,
    },
    "gemv_fp8.cu": {**_QUANTISED, "head_8": _STAGED, "head_16": _STAGED},
    "gemv_mxfp4.cu": _QUANTISED,
    "gemv_nvfp4.cu": _QUANTISED,
    "gemv_int4_32.cu": _QUANTISED,
    "gemv_int4_128.cu": _QUANTISED,
    "qkv.cu": {"qkv_paired_8": _STAGED, "qkv_paired_16": _STAGED, **_WHOLE},
    "qkv_fp8.cu": _WHOLE,
    "qkv_mxfp4.cu": _WHOLE,
    "qkv_nvfp4.cu": _WHOLE,
    "qkv_int4_32.cu": _WHOLE,
    "qkv_int4_128.cu": _WHOLE,
    "route.cu": {"route": _STAGED, "combine": Bound(40)},
    **{
        f"experts_{name}.cu": {"expert_gate_up": Bound(128, 10752), "expert_down": Bound(128, SHARED_LIMIT)}
        for name in ("bf16", "fp8", "mxfp4", "nvfp4", "int4_32", "int4_128")
    },
    **{
        f"chunk_experts_{name}.cu": {"chunk_experts": Bound(248, 41472)}
        for name in ("bf16", "fp8", "mxfp4", "nvfp4", "int4_32", "int4_128")
    },
    "unpack.cu": {
        "unpack_fp8": _UNPACK,
        "unpack_mxfp4": _UNPACK,
        "unpack_nvfp4": _UNPACK,
        "unpack_int4_32": _UNPACK,
        "unpack_int4_128": _UNPACK,
    },
    "latent_qkv.cu": {
        "latent_down_8": _DOWN,
        "latent_down_16": _DOWN,
        "latent_query_8": _QUERY,
        "latent_query_16": _QUERY,
        "latent_rows": Bound(56),
    },
    **{
        f"latent_qkv_{name}.cu": {"latent_down_16": _DOWN, "latent_query_16": _QUERY}
        for name in ("fp8", "mxfp4", "nvfp4", "int4_32", "int4_128")
    },
    "latent_attention.cu": {
        "latent_attention_bf16_16": Bound(240, 168256),
        "latent_attention_bf16_32": Bound(255, 189056),
        "latent_attention_fp8_16": Bound(240, 178496),
        "latent_attention_fp8_32": Bound(255, 199296),
    },
    "latent_value.cu": {"latent_value": Bound(216, 12800)},
    "paged_attention.cu": {
        "decode_attention_bf16_64": Bound(168, 66560),
        "decode_attention_bf16_128": Bound(248, 99200),
        "decode_attention_bf16_256": Bound(255, 197504),
        "decode_attention_fp8_64": Bound(168, 66560),
        "decode_attention_fp8_128": Bound(248, 99200),
        "decode_attention_fp8_256": Bound(255, 197504),
    },
    "prefill.cu": {
        "prefill_attention_bf16_64": Bound(208, 49152),
        "prefill_attention_bf16_128": Bound(248, 98304),
        "prefill_attention_bf16_256": Bound(255, 98304),
        "prefill_attention_fp8_64": Bound(208, 50176),
        "prefill_attention_fp8_128": Bound(248, 99328),
        "prefill_attention_fp8_256": Bound(255, 98816),
    },
    "prefill_kv.cu": {
        "prefill_kv_bf16_64": Bound(48),
        "prefill_kv_bf16_128": Bound(48),
        "prefill_kv_bf16_256": Bound(48),
        "prefill_kv_fp8_64": Bound(48),
        "prefill_kv_fp8_128": Bound(48),
        "prefill_kv_fp8_256": Bound(48),
    },
    "sample.cu": {"sample_scan": Bound(72, 800), "sample_select": Bound(96, 49024)},
    "roofline.cu": {"read_stream": Bound(64), "empty_step": Bound(16), "meet": Bound(24)},
}


def shared_bound(source: str, kernel: str) -> int:
    """Bytes of dynamic shared memory that a block may take; all there is for a kernel of no table."""
    bound = BUILDS.get(source, {}).get(kernel)
    return SHARED_LIMIT if bound is None else bound.shared
