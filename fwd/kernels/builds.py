"""The one table of builds: every kernel of `cuda/`, and how many registers a thread of it may take.

A kernel is an `extern "C" __global__` function; `tests/kernels/test_builds.py` holds that table and sources name the
same ones, that no build spills or takes static shared memory, and that none takes more registers than stand here.
"""

ARCHES = ("sm_90a", "sm_100a")  # H100 and H200; B200
MAX_BUILDS = 150  # kernels × arches: what a first start without a cache has to compile

BUILDS: dict[str, dict[str, int]] = {  # file in `cuda/` → kernel → registers a thread, at most, on every arch
    "gemv.cu": {
        "embed": 32,
        "linear_1x8": 128,
        "linear_1x16": 128,
        "linear_2x8": 128,
        "linear_2x16": 255,
        "gate_up_8": 128,
        "gate_up_16": 128,
        "head_8": 128,
        "head_16": 128,
    },
    "qkv.cu": {"qkv_paired_8": 128, "qkv_paired_16": 128, "qkv_whole_8": 128, "qkv_whole_16": 128},
    "paged_attention.cu": {
        "decode_attention_bf16_64": 168,
        "decode_attention_bf16_128": 248,
        "decode_attention_bf16_256": 255,
        "decode_attention_fp8_64": 168,
        "decode_attention_fp8_128": 248,
        "decode_attention_fp8_256": 255,
    },
    "prefill.cu": {
        "prefill_attention_bf16_64": 208,
        "prefill_attention_bf16_128": 248,
        "prefill_attention_bf16_256": 255,
        "prefill_attention_fp8_64": 208,
        "prefill_attention_fp8_128": 248,
        "prefill_attention_fp8_256": 255,
    },
    "prefill_kv.cu": {
        "prefill_kv_bf16_64": 48,
        "prefill_kv_bf16_128": 48,
        "prefill_kv_bf16_256": 48,
        "prefill_kv_fp8_64": 48,
        "prefill_kv_fp8_128": 48,
        "prefill_kv_fp8_256": 48,
    },
    "sample.cu": {"sample_scan": 72, "sample_select": 96},
    "roofline.cu": {"read_stream": 64, "empty_step": 16, "meet": 24},
}
