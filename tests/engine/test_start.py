"""What is planned is what the engine then takes: to the byte in tensors, and in resident memory but for Python."""

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from quantised import quantise, quantise_gpt_oss
from reach import held_bytes, tensors
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fwd.engine import start as starting
from fwd.engine.keyfile import prefix_key
from fwd.engine.start import start
from fwd.errors import ConfigError, ModelError
from fwd.kernels.gpu import probe, usable
from fwd.models import load as loading
from fwd.protocol.frames import Channel
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Finished, Load, Submit, from_engine, to_engine
from fwd.protocol.values import Limits

TESTS = Path(__file__).parents[1]
ABSENT = usable(probe())  # a GPU
SIZES = {  # multiples of 64: no packed matrix is padded
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
SLIDING = {
    "head_dim": 32,
    "use_sliding_window": True,
    "sliding_window": 128,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "kv_lora_rank": 112,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
KINDS = {
    "untied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "sliding": lambda: Qwen3Config(**SIZES, **SLIDING, tie_word_embeddings=True),
    "gpt-oss": lambda: GptOssConfig(**SIZES, head_dim=32, num_local_experts=8, num_experts_per_tok=2),
    "moe": lambda: Qwen3MoeConfig(**SIZES, **MIXED, num_experts=8, decoder_sparse_step=2, head_dim=32),
    "latent": lambda: DeepseekV3Config(**SIZES | {"num_key_value_heads": 4}, **MIXED, **LATENT, q_lora_rank=64),
    "latent-direct": lambda: DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, **MIXED, **LATENT, q_lora_rank=None
    ),
}
FOR_KERNELS = {
    "untied": lambda: LlamaConfig(**SIZES, head_dim=64, tie_word_embeddings=False),
    "sliding": lambda: Qwen3Config(**SIZES, **{**SLIDING, "head_dim": 64}, tie_word_embeddings=True),
    "odd": lambda: LlamaConfig(
        **SIZES | {"vocab_size": 301, "hidden_size": 96, "intermediate_size": 160},
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "gpt-oss": lambda: GptOssConfig(**SIZES, head_dim=64, num_local_experts=8, num_experts_per_tok=2),
    "moe": lambda: Qwen3MoeConfig(**SIZES, **MIXED, num_experts=8, decoder_sparse_step=2, head_dim=64),
    "latent": KINDS["latent"],
    "latent-direct": KINDS["latent-direct"],
}
FORMATS = {  # kind → layout of its files; sizes that pad, blocks that no kernel takes
    "untied": "nvfp4-compressed",
    "odd": "int4-compressed",
    "sliding": "fp8-channel",
    "gpt-oss": "mxfp4",
    "moe": "awq",
    "latent": "fp8-modelopt-block",
    "latent-direct": "fp8-deepseek",
}
IN_ENGINE = (
    "weights",
    "head",
    "rope",
    "kv",
    "steps",
    "lines",
    "kernels",
)  # kinds that a load takes; the others come and go with the work
BIG = LlamaConfig(  # deep and narrow: what one layer takes while it works is small beside what is held
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=96,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
NARROW = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
DEEP = {  # the same of experts
    "gpt-oss": lambda: GptOssConfig(**NARROW, head_dim=64, num_local_experts=16),
    "moe": lambda: Qwen3MoeConfig(**NARROW, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256),
    "latent": lambda: DeepseekV3Config(
        **NARROW, **LATENT | {"n_routed_experts": 16}, num_experts_per_tok=4, moe_intermediate_size=256, q_lora_rank=64
    ),
}


def write(config, folder, dtype=torch.float32):
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    return {kind: write(config(), tmp_path_factory.mktemp(kind)) for kind, config in KINDS.items()}


def launch(folder, channel=None, **settings):
    """The loop and what it says of itself."""
    return start(Load(model=str(folder), **settings), channel, lambda *_: None, time.monotonic())


def taken(memory):
    return sum(size for kind, size in memory.items() if kind.split("_")[0] in IN_ENGINE)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"context": 1024, "max_seqs": 16}, {"context": 333, "max_seqs": 3}], ids=str)
def test_the_tensors_of_an_engine_are_those_planned(folders, kind, dtype, kv_dtype, sizes):
    loop, info = launch(folders[kind], dtype=dtype, kv_dtype=kv_dtype, **sizes)
    assert held_bytes(loop._runner) == taken(info.memory)
    assert info.kv_dtype == (dtype if kv_dtype == "auto" else kv_dtype)
    assert info.kv_bytes == sum(size for name, size in info.memory.items() if name.startswith("kv_"))
    assert info.context == sizes["context"]
    assert info.pages == sizes["max_seqs"] * -(-sizes["context"] // info.page_size)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("kind", "layout"), [*((kind, "") for kind in FOR_KERNELS), *FORMATS.items()], ids=lambda name: name or "plain"
)
def test_the_tensors_of_an_engine_of_kernels_are_those_planned(tmp_path, kind, layout, kv_dtype):
    folder = write(FOR_KERNELS[kind](), tmp_path / "source", torch.bfloat16)
    if layout == "mxfp4":
        quantise_gpt_oss(folder, tmp_path / "quantised", tmp_path / "plain")
    elif layout:
        quantise(folder, layout, tmp_path / "quantised", tmp_path / "plain")
    if layout:
        folder = tmp_path / "quantised"
    loop, info = launch(folder, device="host", kv_dtype=kv_dtype, context=333, max_seqs=3)
    assert (info.device, info.kernel_set, info.launches) == ("host", "host", "host")
    assert held_bytes(loop._runner) == taken(info.memory)


@pytest.mark.parametrize("device", ["cpu", "host"])
@pytest.mark.parametrize("kind", ["untied", "odd", "latent"])
def test_the_tensors_of_a_requantised_engine_are_those_planned(tmp_path, kind, device):
    folder, requant = write(FOR_KERNELS[kind](), tmp_path, torch.bfloat16), ("fp8-head", "fp8-attn")
    loop, info = launch(folder, device=device, requant=requant, context=333, max_seqs=3)
    assert info.requant == tuple(sorted(requant))
    assert info.memory["head_fp8"] > 0
    assert held_bytes(loop._runner) == taken(info.memory)


def test_formats_without_a_kernel_are_named_and_refused_where_that_is_asked_for(tmp_path):
    write(FOR_KERNELS["odd"](), tmp_path / "source", torch.bfloat16)
    quantise(tmp_path / "source", "fp8-deepseek", tmp_path / "quantised", tmp_path / "plain")
    with capture_logs() as lines:
        _, info = launch(tmp_path / "quantised", device="host")
    assert info.fallbacks[0].startswith("model.layers.0.self_attn.q_proj and ")
    assert all(line.endswith("×40, kernels take multiples of 8×128") for line in info.fallbacks)
    assert [each["reason"] for each in lines if each["event"] == "weights_rounded"] == list(info.fallbacks)
    assert "weights_fp8" not in info.memory
    with pytest.raises(ModelError, match=r"^--strict: model\.layers\.0.*: leave it out, or use --device cpu$"):
        launch(tmp_path / "quantised", device="host", strict=True)
    assert launch(tmp_path / "quantised", device="cpu", strict=True)[1].fallbacks == ()
    assert launch(tmp_path / "source", device="host", strict=True)[1].fallbacks == ()


def test_a_buffer_that_nobody_planned_is_noticed(folders):
    loop, info = launch(folders["tied"])
    loop._runner.forgotten = torch.zeros(1)
    assert held_bytes(loop._runner) == taken(info.memory) + 4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"context": 1025}, "context: 1025 is more than the 1024 tokens of the model"),
        ({"context": 1024, "kv_bytes": 40_000}, "kv_bytes: 40000 hold 16 tokens; raise it to 2097152"),
        ({"kv_dtype": "int4"}, "kv-dtype: unknown 'int4'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"state_dir": "/nowhere"}, "/nowhere/prefix.key"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(folders, monkeypatch, settings, named):
    monkeypatch.setattr(loading, "Checkpoint", None)
    with pytest.raises(ConfigError, match=named):
        launch(folders["untied"], **settings)


def test_a_model_that_does_not_fit_is_refused_before_a_weight_is_read(folders, monkeypatch):
    monkeypatch.setattr(loading, "Checkpoint", None)
    monkeypatch.setattr(starting, "available", lambda: 300 << 20)
    with pytest.raises(ConfigError, match=r"the model does not fit: it needs [\d,]+ bytes at least and cpu has 314,"):
        launch(folders["untied"])


def test_a_dtype_that_is_not_known_is_refused(folders):
    with pytest.raises(ModelError, match="float16 is not supported"):
        launch(folders["untied"], dtype="float16")


def test_the_key_of_the_prefix_cache_is_kept_where_there_is_a_state_directory(folders, tmp_path):
    launch(folders["tied"], state_dir=str(tmp_path))
    kept = (tmp_path / "prefix.key").read_bytes()
    launch(folders["tied"], state_dir=str(tmp_path))
    assert (tmp_path / "prefix.key").read_bytes() == kept == prefix_key(str(tmp_path))


def anonymous():
    """Bytes of resident memory that belong to no file: mapped weights are not among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def ask(theirs):
    """Have one request of almost a whole context answered, and hang up."""
    prompt = pack_ids(range(100))
    theirs.send(Submit(id=1, prompt=prompt, limits=Limits(max_tokens=4), seed=1))
    while not isinstance(theirs.receive(), Finished):
        pass
    theirs.close()


def answer(folder, dtype, loaded=lambda loop: None):
    """Start and answer one request; the loop, kept alive, what it says of itself and what `loaded` said of it."""
    ours, theirs = socket.socketpair()
    loop, info = launch(folder, Channel(ours, to_engine), dtype=dtype, threads=1)
    found = loaded(loop)
    threading.Thread(target=ask, args=[Channel(theirs, from_engine)], daemon=True).start()
    loop.run()
    return loop, info, found


def touched(loop):
    """The resident memory once all of the cache is."""
    arena = max(tensors(loop._runner), key=lambda one: 0 if one.is_mkldnn else one.untyped_storage().nbytes())
    torch.empty(0, dtype=torch.uint8).set_(arena.untyped_storage()).zero_()
    return anonymous()


def measure(folder, small, dtype):
    """In a process of its own: what it grows by, at the start with the cache touched and after some work.

    A small model goes first: modules, and what oneDNN compiles when it is first used, are not the model's.
    """
    torch.set_num_threads(1)  # threads wait for each other where others want the cores too
    answer(small, dtype)
    gc.collect()
    before = anonymous()
    loop, info, loaded = answer(folder, dtype, touched)
    worked = anonymous()  # while the loop lives
    found = {"loaded": loaded - before, "worked": worked - before, "memory": info.memory}
    del loop
    sys.stdout.write(json.dumps(found))


def measured(folder, small, dtype):
    command = [sys.executable, __file__, str(folder), str(small), dtype]
    paths = {"PYTHONPATH": f"{TESTS}:{TESTS / 'models'}"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | paths)
    return json.loads(done.stdout.splitlines()[-1])


PYTHON = 5e6  # bytes of the objects of 96 layers and of what oneDNN compiles for their shapes: about 4 million


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_memory_is_what_is_planned(tmp_path, folders, dtype):
    write(BIG, tmp_path, getattr(torch, dtype))
    found = measured(tmp_path, folders["untied"], dtype)
    memory = found["memory"]
    assert taken(memory) > 300e6
    assert found["loaded"] == pytest.approx(taken(memory), abs=PYTHON)
    filled = sum(memory.values()) - memory["corpus"]  # which takes millions of ids to fill
    assert found["worked"] == pytest.approx(filled, abs=PYTHON)


@pytest.mark.parametrize("kind", DEEP)
def test_resident_memory_of_other_families_is_what_is_planned(tmp_path, folders, kind):
    write(DEEP[kind](), tmp_path, torch.bfloat16)
    if kind == "moe":
        narrow(tmp_path)
    found = measured(tmp_path, folders["untied"], "bfloat16")
    memory = found["memory"]
    assert taken(memory) > 100e6
    assert ("weights_fp8" in memory) == (kind == "moe")
    assert found["loaded"] == pytest.approx(taken(memory), abs=4e6)
    assert found["worked"] < sum(memory.values()) + 4e6


def narrow(folder):
    """Make all matrices of layers FP8 with a scale each."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max().float() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))


@pytest.mark.gpu
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_device_memory_is_what_is_planned(tmp_path):
    write(BIG, tmp_path, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    _, info = launch(tmp_path, device="cuda", dtype="bfloat16")
    assert torch.cuda.memory_allocated() - before == pytest.approx(taken(info.memory), rel=0.01)


if __name__ == "__main__":
    measure(*sys.argv[1:])
