"""`--requant`: plain heads and attention projections become FP8 at load; what that takes, and what it costs."""

import json
import shutil

import checkpoints
import numpy as np
import pytest
import torch
from parity import logits_of
from quantised import quantise

from fwd.errors import ConfigError
from fwd.kernels.qtensor import QTensor
from fwd.kernels.requantize import to_fp8
from fwd.models.config import read_spec, run_spec
from fwd.models.divergence import WINDOW, divergence
from fwd.models.load import load
from fwd.models.spec import REQUANT

KINDS = ("llama", "llama-tied", "gpt-oss", "qwen3-moe-odd", "deepseek", "deepseek-odd")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        checkpoints.make(kind, folder)
    return made


def test_each_number_is_the_nearest_that_the_row_s_scale_allows():
    weight = torch.randn(1030, 72, generator=torch.Generator().manual_seed(1))
    weight[7] = 0
    found = to_fp8(QTensor.plain(weight))
    scales = np.where(weight[:, :1] == 0, 1, weight.abs().amax(1, keepdim=True) / 448)
    scales[7] = 1
    assert np.array_equal(found.scales.numpy(), np.float32(scales))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    for row in (0, 7, 1029):
        near = (weight[row, :, None] / found.scales[row] - every).abs().amin(dim=1)
        apart = (weight[row] / found.scales[row] - found.data[row].float()).abs()
        torch.testing.assert_close(apart, near, rtol=0, atol=1e-5)
    assert not found.data[7].float().any()


@pytest.mark.parametrize("requant", [(REQUANT[0],), (REQUANT[1],), REQUANT], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_is_what_the_spec_says(folders, kind, requant):
    spec, plain = (run_spec(read_spec(folders[kind]), "bfloat16", names) for names in (requant, ()))
    model = load(folders[kind], device="cpu", dtype="bfloat16", requant=requant)
    assert (spec.parameters(), spec.active_parameters()) == (plain.parameters(), plain.active_parameters())
    assert (model.head.format == "fp8") == ("fp8-head" in requant)
    attention = model.layers[0].latents.down if spec.mla else model.layers[0].attention.qkv.weight
    assert (attention.format == "fp8") == ("fp8-attn" in requant)
    parts = [held for held in spec.held if held.format == "fp8"]
    heads = int("fp8-head" in requant)
    each = 3 if spec.mla and spec.mla.q_rank else 2 + bool(spec.mla)
    assert len(parts) == heads + ("fp8-attn" in requant) * spec.layers * each
    assert sum(held.nbytes for held in parts) == spec.weights()["fp8"]
    assert spec.step_bytes(1, 16, "bfloat16") < plain.step_bytes(1, 16, "bfloat16")


@pytest.mark.parametrize(
    ("requant", "named"),
    [(("fp8-mlp",), "unknown 'fp8-mlp': use fp8-head, fp8-attn"), (("fp8-attn",), "fp8-attn changes nothing")],
)
def test_what_changes_nothing_is_refused(folders, tmp_path, requant, named):
    quantise(folders["llama"], "fp8-channel", tmp_path / "quantised", tmp_path / "plain")
    with pytest.raises(ConfigError, match=f"^requant: {named}"):
        load(tmp_path / "quantised", device="cpu", dtype="bfloat16", requant=requant)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt-oss", "deepseek"])
def test_the_divergence_is_that_of_the_distributions(folders, kind):
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    found, tokens = divergence(folders[kind], ids, device="cpu", dtype="float32", requant=REQUANT)
    assert tokens == 70 <= WINDOW
    models = [load(folders[kind], device="cpu", dtype="float32", requant=names) for names in ((), REQUANT)]
    before, after = (logits_of(model, torch.tensor(ids), 0, 10)[:70].double().log_softmax(dim=-1) for model in models)
    assert found == pytest.approx((before.exp() * (before - after)).sum(dim=-1).mean().item(), rel=0.01)
    few, _ = divergence(folders[kind], ids, device="cpu", dtype="float32", requant=("fp8-head",))
    assert 0 < few < found


def test_each_window_is_read_behind_what_a_text_begins_with_and_fits_the_context(folders, tmp_path):
    shutil.copytree(folders["llama"], folder := tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    ids = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    how = {"device": "cpu", "dtype": "float32", "requant": ("fp8-attn",)}
    found, tokens = divergence(folder, ids, head=[7], **how)
    parts = [divergence(folder, [7, *part], **how) for part in (ids[:31], ids[31:])]
    assert tokens == sum(count for _, count in parts) == 52
    assert found == pytest.approx(sum(nats * count for nats, count in parts) / tokens, rel=1e-6)
