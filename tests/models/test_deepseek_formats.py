"""Quantised checkpoints of models that keep latents, as they were released: FP8 blocks, INT4 experts."""

import itertools
import json

import checkpoints
import parity
import pytest
import torch
from parity import logits_of, tokens
from safetensors.torch import load_file, save_file

from fwd.models.load import load

INT4 = {  # Kimi K2.5's: experts that not all rows visit
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
}


def in_fp8_blocks(weight, block):
    """What DeepSeek-V3 stores of a matrix, and the numbers that it stands for."""
    rows, columns = (torch.arange(size) // block for size in weight.shape)
    scales = torch.zeros(rows[-1] + 1, columns[-1] + 1)
    for row, column in itertools.product(range(rows[-1] + 1), range(columns[-1] + 1)):
        part = weight[row * block : (row + 1) * block, column * block : (column + 1) * block]
        scales[row, column] = part.abs().max() / 448
    spread = scales[rows][:, columns]
    numbers = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scales}, numbers.float() * spread


def in_int4_groups(weight, group=32):
    """The same of compressed-tensors: eight inputs a word, the first in the lowest bits, 8 stands for 0."""
    scales = torch.stack([part.abs().amax(1) / 7 for part in weight.split(group, dim=1)], dim=1).bfloat16()
    spread = scales.float().repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    numbers = (weight / spread).round().clamp(-8, 7).long()
    words = ((numbers + 8).view(len(weight), -1, 8) << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    shape = torch.tensor(weight.shape)
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}, numbers * spread


def pair(kind, folder, wanted, write, quantization):
    """Folders of a checkpoint whose matrices of `wanted` modules are quantised, and of what they stand for."""
    coded, plain = folder / "coded", folder / "plain"
    for each in (coded, plain):
        checkpoints.make(kind, each, seed=3)
    config, tensors = json.loads((coded / "config.json").read_text()), load_file(coded / "model.safetensors")
    stored, numbers = {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not wanted(module):
            stored[name] = numbers[name] = tensor
            continue
        parts, numbers[name] = write(tensor)
        stored |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
    assert len(stored) > len(tensors)
    save_file(stored, coded / "model.safetensors")
    save_file(numbers, plain / "model.safetensors")
    config.get("text_config", config)["quantization_config"] = quantization
    (coded / "config.json").write_text(json.dumps(config))
    return coded, plain


def check_same(coded, plain):
    ids = tokens(80, seed=6)
    found, expected = (logits_of(load(folder, dtype="float32"), ids, 64, 16) for folder in (coded, plain))
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
    parity.check_steps_of_any_width(load(coded, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("kind", "block"), [("deepseek", 16), ("deepseek", 128), ("deepseek-odd", 16), ("glm4-moe-lite", 128)]
)
def test_blocks_of_fp8_give_the_numbers_they_stand_for(kind, block, tmp_path):
    """Blocks end within heads, within the joined latents and within their rotated part."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}

    def projects(module):
        return ".layers." in module and module.endswith(("_proj", "_with_mqa"))

    folders = pair(kind, tmp_path, projects, lambda weight: in_fp8_blocks(weight, block), quantization)
    check_same(*folders)
    for layer in load(folders[0]).layers:
        assert {layer.latents.down.format, layer.latents.query.format, layer.output.format} == {"fp8"}


def test_int4_experts_give_the_numbers_they_stand_for(tmp_path):
    folders = pair("kimi-k25", tmp_path, lambda module: ".mlp.experts." in module, in_int4_groups, INT4)
    check_same(*folders)
    (_, *mixed) = load(folders[0]).layers
    assert {layer.mlp.experts.gate_up.format for layer in mixed} == {"int4"}
    assert {layer.mlp.experts.shared_gate_up.format for layer in mixed} == {"fp32"}
