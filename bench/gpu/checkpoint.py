"""A model folder with true shapes and random weights: `python -m gpu.checkpoint MODEL FOLDER [--device cuda]`.

Weights are drawn on the device and go to one safetensors file, tensor by tensor. Every token of the tokenizer but the
first 256, which are the bytes, is a word of its own.
"""

import argparse
import json
import math
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from fwd.models.spec import ModelSpec
from gpu.configs import MODELS
from gpu.shapes import spec

SEED = 20261124
END = "<|end|>"
SLICE = 64 << 20  # numbers drawn at once
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def shapes(model: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, as transformers names them."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    yield "model.embed_tokens.weight", (model.vocab, model.hidden)
    for layer in range(model.layers):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", (model.hidden,)
        yield f"{at}self_attn.q_proj.weight", (q, model.hidden)
        yield f"{at}self_attn.k_proj.weight", (kv, model.hidden)
        yield f"{at}self_attn.v_proj.weight", (kv, model.hidden)
        yield f"{at}self_attn.o_proj.weight", (model.hidden, q)
        yield f"{at}post_attention_layernorm.weight", (model.hidden,)
        yield f"{at}mlp.gate_proj.weight", (model.intermediate, model.hidden)
        yield f"{at}mlp.up_proj.weight", (model.intermediate, model.hidden)
        yield f"{at}mlp.down_proj.weight", (model.hidden, model.intermediate)
    yield "model.norm.weight", (model.hidden,)
    if not model.tied:
        yield "lm_head.weight", (model.vocab, model.hidden)


def write(name: str, folder: Path, device: str) -> int:
    """Write the folder; return the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name], indent=1))
    _write_tokenizer(folder, MODELS[name]["vocab_size"])
    return _write_weights(folder / "model.safetensors", dict(shapes(spec(name))), device)


def _write_weights(path: Path, tensors: dict[str, tuple[int, ...]], device: str) -> int:
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    generator = torch.Generator(device).manual_seed(SEED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            for piece in _drawn(shape, generator):
                file.write(memoryview(piece.view(torch.uint8).cpu().numpy()))
    return end


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """A tensor in pieces of its flat numbers: norms near 1, matrices that keep the size of what they multiply."""
    mean, deviation = (1.0, 0.02) if len(shape) == 1 else (0.0, shape[-1] ** -0.5)
    left = math.prod(shape)
    while left:
        count = min(left, SLICE)
        drawn = torch.randn(count, generator=generator, device=generator.device)
        yield (drawn * deviation + mean).to(torch.bfloat16)
        left -= count


def _write_tokenizer(folder: Path, vocab: int) -> None:
    words = islice((" " + "".join(letters) for letters in product(LETTERS, repeat=4)), vocab)
    table = {END: 0} | {letter: 1 + index for index, letter in enumerate(_alphabet())}
    table |= {word.replace(" ", "Ġ"): index for index, word in enumerate(words, len(table)) if index < vocab}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 0, "content": END, "single_word": False, "lstrip": False, "rstrip": False}
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": table, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def _alphabet() -> list[str]:
    """The letter of each byte in byte-level tokenizers (Radford et al. 2019)."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in kept else next(moved)) for byte in range(256)]


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    print(write(chosen.model, chosen.folder, chosen.device))


if __name__ == "__main__":
    main()
