"""Quantised checkpoints: in each layout that is read, a folder beside one of the plain matrices that it means."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from number_writers import (
    awq,
    fp8,
    gptq,
    int4_compressed,
    mxfp4,
    mxfp4_stack,
    mxfp4_typed,
    nvfp4_compressed,
    nvfp4_modelopt,
    shuffled,
)
from safetensors.torch import load_file, save_file


@dataclass
class Layout:
    """A writer, what a config says of it, and which tensors stand beside the matrices."""

    write: object
    config: dict
    beside: tuple[str, ...] = ()
    older: dict | None = field(default=None)  # hf_quant_config.json


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def modelopt(algorithm):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "*mlp.gate"]}


def _fp8_group(**weights):
    return compressed("float-quantized", num_bits=8, type="float", symmetric=True, **weights)


def _int_group(**weights):
    return compressed("pack-quantized", num_bits=4, type="int", **weights)


def _gptq_config(**fields):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, **fields}


BLOCK = (48, 40)  # ragged in the shrunken models
LAYOUTS = {
    "fp8-deepseek": Layout(
        lambda m: fp8(m, BLOCK, ".weight_scale_inv"),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
    ),
    "fp8-mistral": Layout(
        lambda m: fp8(m, (0, 0), ".weight_scale_inv", shape=lambda _: (), extras=(".activation_scale",)),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "fp8-tensor": Layout(
        lambda m: fp8(m, (0, 0), ".weight_scale", dtype=torch.bfloat16, shape=lambda _: (1,)),
        _fp8_group(strategy="tensor"),
    ),
    "fp8-channel": Layout(
        lambda m: fp8(m, (1, 0), ".weight_scale", dtype=torch.bfloat16), _fp8_group(strategy="channel")
    ),
    "fp8-block": Layout(
        lambda m: fp8(m, BLOCK, ".weight_scale", dtype=torch.bfloat16),
        _fp8_group(strategy="block", block_structure=list(BLOCK)),
    ),
    "fp8-fbgemm": Layout(
        lambda m: fp8(m, (1, 0), ".weight_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
    "fp8-modelopt": Layout(
        lambda m: fp8(m, (0, 0), ".weight_scale", shape=lambda _: (), extras=(".input_scale",)),
        modelopt("FP8"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ),
    "fp8-modelopt-channel": Layout(
        lambda m: fp8(m, (1, 0), ".weight_scale", shape=lambda s: s[:1]), modelopt("FP8_PER_CHANNEL_PER_TOKEN")
    ),
    "fp8-modelopt-block": Layout(
        lambda m: fp8(m, (128, 128), ".weight_scale", shape=lambda s: (s[0], 1, s[1], 1)), modelopt("FP8_PB_WO")
    ),
    "mxfp4-compressed": Layout(
        mxfp4, compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
    ),
    "mxfp4-compressed-e8m0": Layout(
        lambda m: mxfp4_typed(m, torch.float8_e8m0fnu),
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "nvfp4-modelopt": Layout(nvfp4_modelopt, modelopt("NVFP4")),
    "nvfp4-modelopt-older": Layout(
        nvfp4_modelopt,
        {},
        ("self_attn.k_scale", "self_attn.v_scale"),
        {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}},
    ),
    "nvfp4-compressed": Layout(
        nvfp4_compressed,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
    "int4-compressed": Layout(lambda m: int4_compressed(m, 32), _int_group(strategy="group", group_size=32)),
    "int4-compressed-channel": Layout(lambda m: int4_compressed(m, 0), _int_group(strategy="channel")),
    "int4-compressed-zeros": Layout(
        lambda m: int4_compressed(m, 16, zeros=True), _int_group(strategy="group", group_size=16, symmetric=False)
    ),
    "int4-compressed-order": Layout(
        lambda m: int4_compressed(m, 32, order=shuffled(m.shape[1], 32)),
        _int_group(strategy="group", group_size=32, actorder="group"),
    ),
    "gptq": Layout(lambda m: gptq(m, 32), _gptq_config()),
    "gptq-symmetric": Layout(lambda m: gptq(m, 32, zeros=False), _gptq_config(sym=True)),
    "gptq-v2": Layout(lambda m: gptq(m, 32, less=0), _gptq_config(checkpoint_format="gptq_v2")),
    "gptq-order": Layout(lambda m: gptq(m, 32, order=shuffled(m.shape[1], 32)), _gptq_config(desc_act=True)),
    "gptq-channel": Layout(lambda m: gptq(m, 0), _gptq_config(group_size=-1)),
    "awq": Layout(
        lambda m: awq(m, 32),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ),
}
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def write_modules(folder: Path, layout: str, matrices, **config):
    """Write a folder with nothing but modules {name: matrix}; return what their matrices mean."""
    made = {name: LAYOUTS[layout].write(matrix) for name, matrix in matrices.items()}
    tensors = {name + suffix: each for name, (own, _) in made.items() for suffix, each in own.items()}
    write_folder(folder, tensors, {"quantization_config": LAYOUTS[layout].config or None, **config})
    return {name: matrix for name, (_, matrix) in made.items()}


def write_folder(folder: Path, tensors, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def quantise(source: Path, layout: str, quantised: Path, plain: Path):
    """Write the model of a plain folder in a layout, and once more in float32 with the matrices that it then has."""
    chosen, tensors = LAYOUTS[layout], load_file(source / "model.safetensors")
    made, meant = {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and "_proj" in module.rpartition(".")[2]:
            own, matrix = chosen.write(tensor.float().numpy())
            made |= {module + suffix: each for suffix, each in own.items()}
            meant[name] = torch.from_numpy(matrix)
        else:
            made[name] = meant[name] = tensor
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    made |= {f"model.layers.{layer}.{name}": torch.tensor(1.0) for layer in range(layers) for name in chosen.beside}
    _write_pair(source, made, meant, chosen.config, quantised, plain)
    if chosen.older:
        (quantised / "hf_quant_config.json").write_text(json.dumps(chosen.older))


def quantise_gpt_oss(source: Path, quantised: Path, plain: Path):
    """The same for gpt-oss: its experts in MXFP4, as OpenAI has them; transformers writes them [E, in, out]."""
    made, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            own, matrices = mxfp4_stack(tensor.float().transpose(1, 2).numpy())
            made |= {name + suffix: each for suffix, each in own.items()}
            meant[name] = torch.from_numpy(matrices).transpose(1, 2)
        else:
            made[name] = meant[name] = tensor
    _write_pair(source, made, meant, GPT_OSS, quantised, plain)


def _write_pair(source, made, meant, scheme, quantised, plain):
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, extra in ((quantised, made, {"quantization_config": scheme}), (plain, meant, {})):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        write_folder(folder, tensors, config | (extra if scheme else {}))
