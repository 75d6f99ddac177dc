"""What a config says of rope and of sliding windows is what `transformers` makes of it; what cannot be is refused."""

import subprocess
import sys

import pytest
import torch
from plain_config import BASE, FULL, LLAMA3, SLIDES, SLIDING
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fwd.errors import ModelError
from fwd.models.config import parse_spec
from fwd.models.rope import frequencies, rope_table
from fwd.models.spec import RopeSpec


def test_old_and_new_rope_fields_are_read_alike():
    old = parse_spec({**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}})
    mixed = parse_spec({**BASE, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    new = parse_spec({**BASE, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}})
    assert old == mixed == new
    assert new.rope == RopeSpec("llama3", 5e5, 8.0, 128, 1.0, 4.0)


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
