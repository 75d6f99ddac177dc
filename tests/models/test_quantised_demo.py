"""What 8 and 4 bits cost the embedded model on held-out text: its perplexity's rise, and the KL divergence from it.

Both are printed. Weights are quantised, activations float32, so that nothing else differs.
"""

import json
import math
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from number_writers import fp8_dtype, pairs, to_e2m1, to_e4m3
from quantised import LAYOUTS, write_folder
from safetensors.torch import load_file

from fwd.cli import main
from fwd.demo import MODEL, corpus, evaluate
from fwd.kernels.rows import Cells, Rows
from fwd.models.load import load
from fwd.text.tokenizer import Tokenizer

WINDOW, PAGE = 512, 16
TEXTS = (
    "collections/__init__.py",
    "importlib/_bootstrap.py",
    "multiprocessing/resource_tracker.py",
    "xml/dom/minidom.py",
)
TRAINED_ON = ("argparse.py", "dataclasses.py")
WINDOWS = 16  # of TEXTS and, half as many, of TRAINED_ON


@cache
def windows(names):
    """Ids of the beginnings of modules of the standard library: [windows, WINDOW + 1]."""
    tokenizer, library = Tokenizer.load(MODEL), Path(sysconfig.get_paths()["stdlib"])
    each = WINDOWS // len(TEXTS)
    found = [tokenizer.encode((library / name).read_text())[: each * WINDOW + 1] for name in names]
    return torch.stack([torch.tensor(ids).unfold(0, WINDOW + 1, WINDOW) for ids in found]).flatten(0, 1)


@cache
def energy():
    """The mean square of each input of each module, on text of the training."""
    model, found = evaluate.load(MODEL), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: found.__setitem__(f"model.{name}", inputs[0].square().mean((0, 1)))
            )
    with torch.no_grad():
        model(windows(TRAINED_ON))
    return found


def nvfp4_fitted(module, matrix):
    """NVFP4 of compressed-tensors; of the scales near the plain one each block has that of the least squared error.

    Errors are weighted by the energy of their inputs: what is lost of a product is what counts.
    """
    divisor = np.float32(6 * 448 / np.abs(matrix).max())
    blocks, weights = matrix.reshape(len(matrix), -1, 16), energy()[module].numpy().reshape(1, -1, 16)
    plain = to_e4m3(np.abs(blocks).max(-1) / 6 * divisor)[0].astype(int)
    least = np.full(plain.shape, np.inf)
    scales, codes = np.zeros(plain.shape, np.uint8), np.zeros(blocks.shape, np.uint8)
    for step in range(-6, 4):
        tried = np.clip(plain + step, 1, 126).astype(np.uint8)
        scale = fp8_dtype(tried).float().numpy()[..., None] / divisor
        numbers, values = to_e2m1(blocks / scale)
        error = (weights * (values * scale - blocks) ** 2).sum(-1)
        better = error < least
        least[better], scales[better], codes[better] = error[better], tried[better], numbers[better]
    return {
        ".weight_packed": pairs(codes.reshape(matrix.shape)),
        ".weight_scale": fp8_dtype(scales),
        ".weight_global_scale": torch.tensor([divisor]),
    }


def written(folder, layout):
    """A copy of the embedded model in a layout; `fitted` is NVFP4 with scales that were looked for."""
    shutil.copytree(MODEL, folder)
    known = LAYOUTS["nvfp4-compressed" if layout == "fitted" else layout]
    tensors = {}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            matrix = tensor.float().numpy()
            own = nvfp4_fitted(module, matrix) if layout == "fitted" else known.write(matrix)[0]
            tensors |= {module + suffix: each for suffix, each in own.items()}
        else:
            tensors[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    write_folder(folder, tensors, config | {"quantization_config": known.config})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a layout, written once."""
    return cache(lambda layout: written(tmp_path_factory.mktemp(layout) / "model", layout))


def logprobs(folder):
    """The distribution after each token of TEXTS, each window a prefill of one chunk: [windows, WINDOW, vocab]."""
    model = load(folder, dtype="float32", context=WINDOW)
    kv, place = model.new_cache([WINDOW // PAGE], PAGE, "float32"), torch.arange(WINDOW)
    cells = Cells(place, torch.arange(WINDOW // PAGE, dtype=torch.int32)[None])
    rows = Rows(place, torch.zeros_like(place), torch.full_like(place, -1), (cells,), chunk=0)
    return torch.stack([model.logits(model.forward(ids[:-1], rows, kv)).log_softmax(-1) for ids in windows(TEXTS)])


@cache
def plain():
    return logprobs(MODEL)


def chosen(found):
    """The log-probability of each token of the text."""
    return found.gather(2, windows(TEXTS)[:, 1:, None])[..., 0].double()


@pytest.fixture
def cost(record_property):
    """By how much the perplexity of a folder rises, and KL(plain ‖ quantised) in nats a token; both are printed."""

    def of(folder, layout):
        rise, divergence = compared(logprobs(folder))
        before = math.exp(-chosen(plain()).mean())
        found = f"{layout}: perplexity {before:.3f} rises by {rise:.2%}, KL divergence {divergence:.5f} nats"
        record_property("measured", found)
        return rise, divergence

    return of


def compared(found):
    rise = math.expm1((chosen(plain()) - chosen(found)).mean().item())
    divergence = (plain().exp() * (plain() - found)).sum(-1, dtype=torch.float64).mean().item()
    return rise, divergence


def test_the_text_is_held_out():
    assert all(map(corpus.held_out, TEXTS))
    assert not any(map(corpus.held_out, TRAINED_ON))


@pytest.mark.parametrize(
    ("layout", "rise", "divergence"),
    [("fp8-channel", 0.005, 0.004), ("fp8-modelopt-block", 0.005, 0.004), ("fitted", 0.02, 0.03)],
)
def test_what_it_costs(folder, cost, layout, rise, divergence):
    found = cost(folder(layout), layout)
    assert abs(found[0]) <= rise
    assert 0 < found[1] <= divergence


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["nvfp4-compressed", "mxfp4-compressed", "int4-compressed", "awq", "gptq"])
def test_what_rounding_to_nearest_costs(folder, cost, layout):
    rise, divergence = cost(folder(layout), layout)
    assert 0 < rise <= 0.05
    assert 0 < divergence <= 0.06


def test_fwd_eval_says_the_same_of_a_quantised_folder(folder, tmp_path):
    """Through plan, loader, protocol and chunks of another size."""
    model, tokenizer, ids = folder("fitted"), Tokenizer.load(MODEL), windows(TEXTS)[0].tolist()
    (tmp_path / "text").write_text(tokenizer.decode(ids))
    result = CliRunner().invoke(
        main, ["eval", str(model), "--text", str(tmp_path / "text"), "--dtype", "float32", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["logprobs"]
    assert found["token_ids"] == ids
    torch.testing.assert_close(
        torch.tensor(found["token_logprobs"][1:], dtype=torch.float64), chosen(logprobs(model))[0], atol=1e-4, rtol=0
    )
