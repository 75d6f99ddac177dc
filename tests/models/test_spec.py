"""config.json: old and new fields read alike, what changes the mathematics refused by name, hostile values bounded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_config import BASE, LLAMA3, SLIDING

from fwd.errors import ModelError
from fwd.models.config import parse_spec, read_spec
from fwd.models.layout import Paged
from fwd.models.safetensors import Entry
from fwd.models.spec import ModelSpec, RopeSpec

DENSE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def test_a_plain_config():
    spec = parse_spec(BASE)
    assert (spec.head_dim, spec.qkv_width, spec.max_context, spec.dtype) == (16, 128, 512, "bfloat16")
    assert spec.rope == RopeSpec("default", 10000.0)
    assert spec.cache == (Paged((0, 1), 2, 16),)
    assert spec.windows == (0, 0)
    assert not any((spec.tied, spec.qkv_bias, spec.output_bias, spec.qk_norm))


def test_dtype_is_read_under_both_names():
    new = {key: value for key, value in BASE.items() if key != "torch_dtype"} | {"dtype": "float16"}
    assert parse_spec(new).dtype == "float16"


def test_families_differ_in_bias_norm_and_head_dim():
    specs = {name: parse_spec({**BASE, "architectures": [name]}) for name in DENSE}
    flags = {name: (spec.qkv_bias, spec.output_bias, spec.qk_norm, spec.head_dim) for name, spec in specs.items()}
    assert flags == {
        "LlamaForCausalLM": (False, False, False, 16),
        "Qwen2ForCausalLM": (True, False, False, 16),
        "Qwen3ForCausalLM": (False, False, True, 128),
    }
    biased = parse_spec({**BASE, "attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias) == (True, True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "this build knows DeepseekV3ForCausalLM, Glm4"),
        ({"architectures": None}, "unknown architecture None"),
        ({"architectures": ["LlamaForCausalLM"] * 2}, "unknown architecture"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 7}, "layer_types"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": [1]}, "rope parameters"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e6}}, "extends the context"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"torch_dtype": "float8"}, "dtype 'float8'"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 2**80}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"vocab_size": None}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(change, named):
    with pytest.raises(ModelError) as refused:
        parse_spec({**BASE, **change})
    assert named in refused.value.message
    assert "\n" not in refused.value.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from([*BASE, *SLIDING, "rope_parameters", "rope_scaling", "rope_theta", "head_dim", "layer_types"]),
    json_values,
    st.sampled_from(sorted(DENSE)),
)
def test_any_value_gives_a_spec_or_a_model_error(key, value, family):
    try:
        spec = parse_spec({**BASE, **(SLIDING if "Qwen" in family else {}), "architectures": [family], key: value})
    except ModelError as error:
        spec = error
    assert isinstance(spec, ModelSpec) or len(spec.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[]", "JSON object"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
    ids=["list", "cut", "binary", "deep"],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=named):
        read_spec(tmp_path)


def test_a_folder_without_config_is_no_model_folder(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_spec(tmp_path)


def test_an_oversized_config_is_not_parsed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE) + " " * (1 << 20))
    with pytest.raises(ModelError, match=r"over the 1048576 that are read"):
        read_spec(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_a_config_that_is_no_file_neither_hangs_nor_fills_the_memory(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    path = tmp_path / name
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("gone")):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(ModelError, match=f"{name} is missing"):
            read_spec(tmp_path)
        if path.is_dir():
            path.rmdir()


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ((0,), "holds no layer 1, but num_hidden_layers is 2"),
        ((0, 1, 3), r"tensor model\.layers\.3\.input_layernorm\.weight has no place: num_hidden_layers is 2"),
    ],
    ids=["fewer", "more"],
)
def test_layers_of_the_files_that_the_config_does_not_count(layers, named):
    def parse(layers):
        names = [f"model.layers.{index}.input_layernorm.weight" for index in layers]
        return parse_spec(BASE, files={name: Entry(Path("file"), "BF16", (64,), 0, 128) for name in names})

    assert parse((0, 1)).layers == 2
    with pytest.raises(ModelError, match=named):
        parse(layers)


@pytest.mark.parametrize(
    ("size", "value", "named"),
    [
        ("vocab_size", 261, "embed_tokens.weight has shape [260, 64], expected [261, 64]"),
        ("intermediate_size", 1 << 22, "gate_proj.weight has shape [96, 64], expected [4194304, 64]"),
        ("num_attention_heads", 8, "q_proj.weight has shape [64, 64], expected [128, 64]"),
    ],
)
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_sizes_that_are_not_the_files_are_refused_with_the_headers(size, value, named, dtype):
    layer = {"self_attn.q_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.down_proj": (64, 96)}
    shapes = {f"model.layers.{index}.{module}": shape for index in range(2) for module, shape in layer.items()}
    shapes |= {"model.embed_tokens": (260, 64)}
    files = {f"{name}.weight": Entry(Path("file"), dtype, shape, 0, 0) for name, shape in shapes.items()}
    files |= {f"{name}.weight_scale": Entry(Path("file"), "F32", (1,), 0, 4) for name in shapes}
    config = {**BASE, "head_dim": 16}
    assert parse_spec(config, files=files).vocab == 260
    with pytest.raises(ModelError, match=re.escape(named)):
        parse_spec(config | {size: value}, files=files)


def test_the_spec_needs_no_torch():
    code = "import sys, fwd.models.spec, fwd.kernels.noise; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
