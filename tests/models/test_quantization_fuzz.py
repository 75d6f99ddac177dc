"""Any config and any headers are a format or one error."""

from hypothesis import given, settings
from hypothesis import strategies as st
from modules import entry, scheme

from fwd.errors import ModelError
from fwd.models.quantization import LAYOUTS, Stored, read_from
from fwd.models.schemes import METHODS, parse_quantization

Q = "model.layers.3.self_attn.q_proj"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = {
    "bits": [4, 8],
    "group_size": [-1, 32, 128],
    "desc_act": [True],
    "checkpoint_format": ["gptq", "gptq_v2"],
    "dynamic": [{"-:.*": {}}, {".*": {"bits": 4}}],
    "version": ["gemm"],
    "fmt": ["e4m3"],
    "weight_block_size": [[128, 128], None],
    "modules_to_not_convert": [["lm_head", "re:.*x", "*y*"]],
    "ignore": [["lm_head"]],
    "quant_algo": ["FP8", "NVFP4", "MIXED_PRECISION"],
    "quantized_layers": [{"a": {"quant_algo": "FP8"}}],
    "format": ["pack-quantized", "float-quantized", "nvfp4-pack-quantized"],
    "config_groups": [{"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group"}}}],
    "lm_head": [True],
}
tables = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(sorted(METHODS)) | json_values},
    optional={name: st.sampled_from(values) | json_values for name, values in FIELDS.items()},
)


def outcome(read):
    """What a reader gives, or the one line it refuses with."""
    try:
        return read()
    except ModelError as error:
        return str(error)


@settings(max_examples=400, derandomize=True)
@given(tables | json_values, st.none() | json_values)
def test_any_config_is_a_scheme_or_one_error(table, older):
    older = None if older is None else {"quantization": older}
    for config in (
        {"quantization_config": table},
        {"text_config": {"compression_config": table}},
        {"text_config": table},
    ):
        found = outcome(lambda config=config: parse_quantization(config, older).format_of(Q))
        assert found is None or isinstance(found, Stored) or ("\n" not in found and len(found) < 1000)


shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, 32, 64, 100, 1 << 40]), max_size=4).map(tuple)
dtypes = st.sampled_from(["F8_E4M3", "U8", "I32", "F32", "BF16", "F16", "I64", "F8_E8M0", "F8_E5M2", "BOOL"])
suffixes = st.sampled_from(sorted({suffix for each in LAYOUTS.values() for suffix in (*each.tensors, *each.extras)}))


@settings(max_examples=400, derandomize=True)
@given(tables, st.none() | st.sampled_from(sorted(LAYOUTS)), st.data())
def test_any_headers_are_a_format_or_one_error(table, layout, data):
    if layout:  # names and dtypes that belong together, in any shapes
        tensors = {name: (kinds[0], data.draw(shapes)) for name, kinds in LAYOUTS[layout].tensors.items()}
    else:
        tensors = data.draw(st.dictionaries(suffixes, st.tuples(dtypes, shapes), max_size=4))
    headers = {f"x{name}": entry(dtype, *shape) for name, (dtype, shape) in tensors.items()}
    found = outcome(lambda: read_from(scheme(**table), headers).format_of("x"))
    assert found is None or isinstance(found, Stored) or "\n" not in found
    assert not isinstance(found, Stored) or found.nbytes(64, 64) >= 0
