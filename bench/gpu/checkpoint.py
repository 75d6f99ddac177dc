"""A model folder with true shapes and random weights: `python -m gpu.checkpoint MODEL FOLDER`.

Weights are drawn on the device and go to one safetensors file, tensor by tensor. Every token of the tokenizer but the
first 256, which are the bytes, is a word of its own.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from fwd.models.checkpoint import DTYPES
from gpu.configs import MODELS
from gpu.shapes import spec
from gpu.tensors import Drawn, tensors

SEED = 20261124
END = "<|end|>"
SLICE = 64 << 20  # numbers drawn at once
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write(name: str, folder: Path, device: str, *, skewed: bool = False) -> int:
    """Write the folder; return the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name], indent=1))
    _write_tokenizer(folder, MODELS[name]["vocab_size"])
    return _write_weights(folder / "model.safetensors", list(tensors(spec(name), skewed=skewed)), device)


def header(drawn: Sequence[Drawn]) -> bytes:
    """What stands before the numbers of a safetensors file, which follow in the same order."""
    table, end = {}, 0
    for tensor in drawn:
        begin, end = end, end + tensor.nbytes
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 64)
    return len(text).to_bytes(8, "little") + text


def _write_weights(path: Path, drawn: Sequence[Drawn], device: str) -> int:
    generator = torch.Generator(device).manual_seed(SEED)
    with path.open("wb") as file:
        file.write(header(drawn))
        for tensor in drawn:
            for piece in _pieces(tensor, generator):
                file.write(memoryview(piece.view(torch.uint8).cpu().numpy()))
    return sum(tensor.nbytes for tensor in drawn)


def _pieces(tensor: Drawn, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """A tensor in pieces of its flat numbers."""
    left = math.prod(tensor.shape)
    while left:
        count = min(left, SLICE)
        yield tensor.draw(count, generator).to(DTYPES[tensor.dtype])
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
    parser.add_argument("--skewed", action="store_true", help="routers that prefer some experts")
    chosen = parser.parse_args()
    print(write(chosen.model, chosen.folder, chosen.device, skewed=chosen.skewed))


if __name__ == "__main__":
    main()
