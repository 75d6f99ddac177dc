"""config.json: old and new fields read alike, what changes the mathematics refused by name, hostile values bounded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fwd.errors import ModelError
from fwd.models.config import parse_spec, read_spec
from fwd.models.layout import Paged
from fwd.models.rope import frequencies, rope_table
from fwd.models.safetensors import Entry
from fwd.models.spec import ModelSpec, RopeSpec

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
DENSE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def test_a_plain_config():
    spec = parse_spec(BASE)
    assert (spec.head_dim, spec.qkv_width, spec.max_context, spec.dtype) == (16, 128, 512, "bfloat16")
    assert spec.rope == RopeSpec("default", 10000.0)
    assert spec.cache == (Paged((0, 1), 2, 16),)
    assert spec.windows == (0, 0)
    assert not any((spec.tied, spec.qkv_bias, spec.output_bias, spec.qk_norm))


def test_old_and_new_rope_fields_are_read_alike():
    old = parse_spec({**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}})
    mixed = parse_spec({**BASE, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    new = parse_spec({**BASE, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}})
    assert old == mixed == new
    assert new.rope == RopeSpec("llama3", 5e5, 8.0, 128, 1.0, 4.0)


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


def test_yarn_extends_the_context():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert parse_spec({**BASE, "rope_parameters": yarn}).max_context == 2048


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 128, "mscale": 1.0, "beta_fast": 16},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 128,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.5},
    ],
    ids=str,
)
def test_rope_frequencies_are_those_of_transformers(parameters):
    full = {**parameters, "rope_theta": 10000.0}
    rope = parse_spec({**BASE, "rope_parameters": full}).rope
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=dict(full))
    if parameters["rope_type"] == "default":
        expected, factor = 10000.0 ** -(torch.arange(0, 16, 2) / 16), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    torch.testing.assert_close(frequencies(rope, 16).float(), expected.float(), rtol=1e-5, atol=0)
    assert rope.attention_factor == pytest.approx(factor)


SLIDING = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
FULL, SLIDES = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "change",
    [
        {},
        SLIDING,
        {**SLIDING, "max_window_layers": 0},
        {**SLIDING, "max_window_layers": 28},
        {**SLIDING, "layer_types": [SLIDES, FULL, SLIDES]},
        {**SLIDING, "layer_types": [FULL] * 3},
        {**SLIDING, "sliding_window": None},
        {**SLIDING, "use_sliding_window": False},
        {"sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "reads"), [("Qwen2ForCausalLM", Qwen2Config), ("Qwen3ForCausalLM", Qwen3Config)])
def test_windows_are_those_of_transformers(name, reads, change):
    sizes = {**BASE, "num_hidden_layers": 3, "max_position_embeddings": 8192, "architectures": [name]}
    config = reads(**sizes, **change)
    expected = tuple(config.sliding_window if kind == SLIDES else 0 for kind in config.layer_types)
    assert parse_spec({**sizes, **change}).windows == expected
    assert parse_spec(config.to_dict() | {"architectures": [name]}).windows == expected


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({}, (4096, 4096)),
        ({"sliding_window": None}, (0, 0)),
        ({"sliding_window": 32, "layer_types": [SLIDES] * 2}, (32, 32)),
    ],
    ids=str,
)
def test_all_layers_of_mistral_have_a_window_or_none(change, windows):
    mistral = {**BASE, "max_position_embeddings": 8192, "architectures": ["MistralForCausalLM"]}
    assert parse_spec({**mistral, **change}).windows == windows
    with pytest.raises(ModelError, match="layer_types"):
        parse_spec({**mistral, **change, "layer_types": [FULL, SLIDES]})


@pytest.mark.parametrize(("window", "found"), [(511, (0, 511)), (512, (0, 0)), (1 << 20, (0, 0))])
def test_a_window_over_the_whole_context_is_none(window, found):
    qwen = {**BASE, "architectures": ["Qwen3ForCausalLM"]}
    assert parse_spec({**qwen, **SLIDING, "sliding_window": window}).windows == found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": [FULL, SLIDES]}, "use_sliding_window is not true"),
        ({**SLIDING, "layer_types": [FULL, "chunked_attention"]}, "full_attention or sliding_attention"),
        ({**SLIDING, "layer_types": [FULL, []]}, "full_attention or sliding_attention"),
        ({**SLIDING, "layer_types": [SLIDES]}, "layer_types names 1 layers, num_hidden_layers 2"),
        ({**SLIDING, "sliding_window": 0}, "sliding_window"),
        ({**SLIDING, "sliding_window": "32"}, "sliding_window"),
        ({**SLIDING, "max_window_layers": -1}, "max_window_layers"),
        ({**SLIDING, "use_sliding_window": "yes"}, "use_sliding_window"),
    ],
    ids=str,
)
def test_windows_that_cannot_be_honoured_are_refused_by_name(change, named):
    with pytest.raises(ModelError) as refused:
        parse_spec({**BASE, "architectures": ["Qwen2ForCausalLM"], **change})
    assert named in refused.value.message


def test_a_rope_table_of_a_million_positions_takes_little_more_than_its_own_memory():
    code = (
        "import resource, torch; from fwd.models.rope import *; peak = lambda: resource.getrusage(0).ru_maxrss << 10;"
        "rope = RopeSpec('default', 1e6); rope_table(rope, 32, 10000); before = peak();"
        "table = rope_table(rope, 32, 1 << 20); print(peak() - before - table.nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 16 << 20


def test_an_entry_of_the_rope_table_does_not_depend_on_its_length():
    rope = RopeSpec("default", 10000.0)
    long = rope_table(rope, 18, 4099)
    for positions in (1, 7, 1000):
        assert torch.equal(rope_table(rope, 18, positions), long[:positions])


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
