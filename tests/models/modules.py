"""Folders that hold nothing but some quantised modules, and what they mean; what configs and headers say of one."""

import json
from pathlib import Path

import numpy as np
import quantised
import torch

from fwd.models import formats
from fwd.models.checkpoint import Checkpoint
from fwd.models.quantization import read_from
from fwd.models.safetensors import Entry
from fwd.models.schemes import parse_quantization


def scheme(**table):
    return parse_quantization({"quantization_config": table})


def entry(dtype, *shape):
    return Entry(Path("model.safetensors"), dtype, shape, 0, 0)


def matrices(shapes, seed=0):
    """Matrices of very different sizes, so that no scale can stand for another's."""
    random = np.random.default_rng(seed)
    return [np.float32(random.standard_normal(shape) * 10.0 ** random.integers(-3, 3)) for shape in shapes]


class Files:
    """A folder that holds nothing but some modules, and what they mean."""

    def __init__(self, folder, layout, shapes, seed=0):
        self.names = [f"model.layers.0.m{index}_proj" for index in range(len(shapes))]
        self.layout = quantised.LAYOUTS[layout]
        meant = quantised.write_modules(folder, layout, dict(zip(self.names, matrices(shapes, seed), strict=True)))
        self.meant = [torch.from_numpy(meant[name]) for name in self.names]
        self.checkpoint = Checkpoint(folder, lambda *_: None)
        config = json.loads((folder / "config.json").read_text())
        self.scheme = read_from(parse_quantization(config, self.layout.older), self.checkpoint.entries)

    def linear(self, outputs, inputs):
        return formats.linear(self.checkpoint, self.scheme, self.names, outputs, inputs)


def same(weight, meant):
    assert torch.equal(weight.dequantize().view(torch.int32), meant.view(torch.int32))
