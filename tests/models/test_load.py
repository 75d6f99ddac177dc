"""Loading: faults planted in every place of a model folder each give one ModelError line."""

import hashlib
import json
import os
import shutil
import struct

import checkpoints
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fwd.errors import ConfigError, ModelError
from fwd.models.checkpoint import MAX_HEADER, Shard
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


def raw(header, data=b"", length=None):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def test_progress_ends_at_the_bytes_of_all_tensors(folder):
    seen = []
    load(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    parameters = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (parameters, parameters)


def test_the_weights_hash_covers_config_and_every_weight(folder):
    first = load(folder).weights_hash
    assert first == load(folder).weights_hash
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    config = (folder / "config.json").read_bytes()
    assert first == hashlib.sha256(config + weights).hexdigest()
    edit(folder, lambda tensors: tensors[Q].view(torch.int32)[3, 3].bitwise_xor_(1))
    assert load(folder).weights_hash != first


def test_shards_load_as_one_file_does(folder):
    whole = load(folder)
    shard(folder)
    parts = load(folder)
    for left, right in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(left.qkv.weight.dequantize(), right.qkv.weight.dequantize())
        assert torch.equal(left.gate_up.dequantize(), right.gate_up.dequantize())
    assert torch.equal(whole.head.dequantize(), parts.head.dequantize())


def test_fused_weights_hold_their_parts_in_order(folder):
    tensors, model = load_file(folder / "model.safetensors"), load(folder)
    attention = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(model.layers[1].qkv.weight.dequantize(), torch.cat(attention))
    mlp = [tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(model.layers[1].gate_up.dequantize(), torch.cat(mlp))


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
    assert "neither model.safetensors nor" in refusal(folder)
    assert "config.json" in refusal(folder / "nowhere")


def test_a_missing_shard_is_named(folder):
    places = shard(folder)
    (folder / places[Q]).unlink()
    assert f"{places[Q]} is missing" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "model.bin", "", 7, None]
)
def test_a_shard_name_that_is_no_plain_file_name_is_refused(folder, name):
    write_index(folder, shard(folder) | {Q: name})
    assert "plain name" in refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 9])
def test_a_broken_index_is_refused(folder, content):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "index.json" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    places = shard(folder)
    other = next(file for file in places.values() if file != places[Q])
    save_file({**load_file(folder / other), Q: torch.ones(64, 64)}, folder / other)
    assert f"tensor {Q} stands in both" in refusal(folder)


def test_a_missing_tensor_is_named_with_its_shape(folder):
    edit(folder, lambda tensors: tensors.pop(Q))
    assert f"tensor {Q} is missing, expected shape [64, 64]" in refusal(folder)


def test_a_tensor_without_a_place_is_named(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(2), "zebra": torch.ones(1)}))
    assert "tensor model.layers.2.extra and 1 more has no place" in refusal(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    edit(folder, lambda tensors: tensors.update({Q: torch.ones(63, 64)}))
    assert f"{Q} has shape [63, 64], expected [64, 64]" in refusal(folder)


def test_a_wrong_dtype_is_named_with_those_expected(folder):
    edit(folder, lambda tensors: tensors.update({Q: torch.ones(64, 64, dtype=torch.int16)}))
    assert f"{Q} has dtype I16, expected one of F32, F16, BF16" in refusal(folder)


def test_a_float16_checkpoint_asks_for_a_dtype(folder):
    configure(folder, dtype="float16")
    assert "--dtype bfloat16 or float32" in refusal(folder)
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_model_that_kernels_do_not_take_is_refused(folder):
    with pytest.raises(ConfigError, match="use --dtype bfloat16 or --device cpu"):
        load(folder, device="host")
    with pytest.raises(ModelError, match="head_dim is 16: the kernels take one of 64, 128, 256; use --device cpu"):
        load(folder, device="host", dtype="bfloat16")


def test_a_file_cut_anywhere_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "model.safetensors" in refusal(folder), size


def test_a_fifo_or_folder_in_place_of_the_weights_does_not_hang(folder):
    path = folder / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert "is missing" in refusal(folder)
    path.unlink()
    path.mkdir()
    assert "is missing" in refusal(folder)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "dtype": "F33"},
        {**GOOD, "dtype": 4},
        {**GOOD, "shape": [2, -2]},
        {**GOOD, "shape": [-2, -2]},
        {**GOOD, "shape": [2.0, 2]},
        {**GOOD, "shape": [True, 4]},
        {**GOOD, "shape": "22"},
        {**GOOD, "shape": [2**40, 2**40]},
        {**GOOD, "shape": [2**63, 2, 0]},
        {**GOOD, "shape": [1] * 9 + [4]},
        {**GOOD, "data_offsets": [0, 17]},
        {**GOOD, "data_offsets": [16, 32]},
        {**GOOD, "data_offsets": [-16, 0]},
        {**GOOD, "data_offsets": [16, 0]},
        {**GOOD, "data_offsets": [0]},
        {**GOOD, "data_offsets": [0, 2**70]},
        {"dtype": "F32", "shape": [2, 2]},
        [],
        None,
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_file_is_refused(tmp_path, entry):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"w": entry}, bytes(16)))
    with pytest.raises(ModelError, match="tensor 'w'"):
        Shard(path)


def test_overlapping_tensors_and_repeated_names_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}, bytes(24)))
    with pytest.raises(ModelError, match="a and b overlap"):
        Shard(path)
    entry = json.dumps(GOOD)
    path.write_bytes(raw(f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(16)))
    with pytest.raises(ModelError, match="stands twice"):
        Shard(path)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_length_out_of_bounds_is_refused_before_it_is_read(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(b"{}", bytes(64), length=length))
    with pytest.raises(ModelError, match="truncated"):
        Shard(path)


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    for pad in range(4):
        values = torch.arange(4.0).view(2, 2)
        path.write_bytes(raw(json.dumps({"w": GOOD}).encode() + b" " * pad, values.numpy().tobytes()))
        assert torch.equal(Shard(path).tensor("w"), values)


def parses(path):
    """Open a file: it is read or refused, nothing else; what is read lies within the file."""
    opened = message = None
    try:
        opened = Shard(path)
    except ModelError as error:
        message = error.message
    if opened is None:
        assert len(message.splitlines()) == 1
        return
    for name, entry in opened.entries.items():
        assert 0 <= entry.begin <= entry.end <= path.stat().st_size
        if entry.dtype in {"F32", "F16", "BF16"} and entry.end > entry.begin:
            assert opened.tensor(name).nbytes == entry.end - entry.begin


def test_every_changed_byte_of_a_header_is_read_or_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    whole = raw({"w": GOOD, "v": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}, bytes(22))
    for place in range(len(whole) - 22):
        for value in (0, 0x20, 0x22, 0x2D, 0x39, 0x5D, 0x7D, 0xFF, whole[place] ^ 1):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            parses(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 80) | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "X"]) | values,
        "shape": st.lists(st.integers(0, 5), max_size=3) | values,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | values,
    }
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=3), entries | values, max_size=4), st.integers(0, 64))
def test_any_header_is_read_or_refused(tmp_path, header, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(header, bytes(size)))
    parses(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    parses(path)
    path.write_bytes(raw(content, bytes(8)))
    parses(path)
