"""Loading: faults planted in every place of a model folder each give one ModelError line."""

import json
import os
import shutil
from unittest import mock

import checkpoints
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fwd.errors import ConfigError, ModelError
from fwd.models import checkpoint
from fwd.models.load import load

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoints.make("llama", path)
    return path


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def edit(folder, change):
    """Rewrite model.safetensors with `change` applied to its dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shard(folder):
    """Split the checkpoint in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for part in (0, 1):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[part::2]}, folder / file)
        places |= dict.fromkeys(names[part::2], file)
    write_index(folder, places)
    return places


def write_index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refusal(folder, **options):
    with pytest.raises(ModelError) as refused:
        load(folder, **options)
    assert "\n" not in refused.value.message
    return refused.value.message


def test_progress_goes_from_nothing_to_the_bytes_of_all_files(folder):
    seen = []
    load(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    size = (folder / "model.safetensors").stat().st_size
    assert seen[0] == (0, size)
    assert seen[-1] == (size, size)


def test_the_weights_hash_covers_config_and_every_weight(folder):
    first = load(folder).weights_hash
    assert first == load(folder).weights_hash
    edit(folder, lambda tensors: tensors[Q].view(torch.int32)[3, 3].bitwise_xor_(1))
    assert load(folder).weights_hash != first


def test_a_changed_config_changes_the_weights_hash(folder):
    first = load(folder).weights_hash
    configure(folder, note="another")
    assert load(folder).weights_hash != first


def test_shards_load_as_one_file_does(folder):
    whole = load(folder)
    shard(folder)
    parts = load(folder)
    for left, right in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(left.attention.qkv.weight.dequantize(), right.attention.qkv.weight.dequantize())
        assert torch.equal(left.mlp.gate_up.dequantize(), right.mlp.gate_up.dequantize())
    assert torch.equal(whole.head.dequantize(), parts.head.dequantize())


def test_fused_weights_hold_their_parts_in_order(folder):
    tensors, model = load_file(folder / "model.safetensors"), load(folder)
    attention = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(model.layers[1].attention.qkv.weight.dequantize(), torch.cat(attention))
    mlp = [tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(model.layers[1].mlp.gate_up.dequantize(), torch.cat(mlp))


def test_a_bfloat16_checkpoint_is_served_as_it_is_or_widened(folder):
    edit(folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    configure(folder, dtype="bfloat16")
    own, wide = load(folder), load(folder, dtype="float32")
    assert (own.dtype, own.spec.dtype, wide.dtype, wide.spec.dtype) == (
        torch.bfloat16,
        "bfloat16",
        torch.float32,
        "float32",
    )
    assert torch.equal(own.embedding.data.float(), wide.embedding.data)
    assert own.embedding.format == "bf16"


def test_a_tied_head_may_be_stored_twice_and_rope_buffers_are_ignored(tmp_path):
    checkpoints.make("llama-tied", tmp_path)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(tmp_path, add)
    assert load(tmp_path).spec.tied


def test_files_beside_the_weights_are_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert load(folder).spec.layers == 2


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_folder_is_refused_with_the_reason(folder, suffix):
    (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")
    assert "run code" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights: neither model.safetensors nor" in refusal(folder)
    assert "config.json" in refusal(folder / "nowhere")


def test_a_missing_shard_is_named(folder):
    places = shard(folder)
    (folder / places[Q]).unlink()
    assert f"{places[Q]} is missing" in refusal(folder)


def test_a_missing_tensor_is_named_with_its_shape(folder):
    edit(folder, lambda tensors: tensors.pop(Q))
    assert f"tensor {Q} is missing, expected shape [64, 64]" in refusal(folder)


def test_a_tensor_without_a_place_is_named(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.1.extra": torch.ones(2), "zebra": torch.ones(1)}))
    assert "tensor model.layers.1.extra and 1 more has no place" in refusal(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    edit(folder, lambda tensors: tensors.update({Q: torch.ones(63, 64)}))
    assert f"{Q} has shape [63, 64], expected [64, 64]" in refusal(folder)


def test_a_wrong_dtype_is_named(folder):
    edit(folder, lambda tensors: tensors.update({Q: torch.ones(64, 64, dtype=torch.int16)}))
    message = refusal(folder)
    assert Q.removesuffix(".weight") in message
    assert "I16" in message


def test_a_float16_checkpoint_asks_for_a_dtype(folder):
    configure(folder, dtype="float16")
    assert "--dtype bfloat16 or float32" in refusal(folder)
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_model_that_kernels_do_not_take_is_refused(folder):
    with pytest.raises(ConfigError, match="use --dtype bfloat16 or --device cpu"):
        load(folder, device="host")
    with pytest.raises(ModelError, match="head_dim is 16: the kernels take one of 64, 128, 256; use --device cpu"):
        load(folder, device="host", dtype="bfloat16")


def test_a_fifo_or_folder_in_place_of_the_weights_does_not_hang(folder):
    path = folder / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert "is missing" in refusal(folder)
    path.unlink()
    path.mkdir()
    assert "is missing" in refusal(folder)


SIZES = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4,
    "head_dim": 1024,
    "num_hidden_layers": 4096,
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(SIZES)), st.data())
def test_sizes_that_are_not_those_of_the_files_are_refused_before_a_tensor_is_allocated(folder, key, data):
    """Of all that the loader allocates nothing is larger than the files."""
    whole = (folder / "config.json").read_text()
    own = json.loads(whole).get(key)
    size = data.draw(st.integers(1, SIZES[key]).filter(lambda value: value != own))
    limit = (folder / "model.safetensors").stat().st_size
    configure(folder, **{key: size})
    try:
        with mock.patch.object(checkpoint.torch, "empty", allocated := Allocations()):
            assert refusal(folder, context=64)
    finally:
        (folder / "config.json").write_text(whole)
    assert max(allocated.sizes, default=0) <= limit


class Allocations:
    """`torch.empty`, and how large the tensors were."""

    def __init__(self):
        self.sizes, self._empty = [], torch.empty

    def __call__(self, *shape, **options):
        self.sizes.append(torch.Size(shape).numel() * 4)
        return self._empty(*shape, **options)
