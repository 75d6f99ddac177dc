"""What headers and scales can tell is refused before a weight is allocated or read."""

import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import quantised
import torch
from kinds import KINDS
from safetensors.torch import load_file, save_file

from fwd.errors import ModelError
from fwd.models import load as loading
from fwd.models import rehearsal as module
from fwd.models import source
from fwd.models.config import read_spec, run_spec
from fwd.models.load import load
from fwd.models.rehearsal import Rehearsal, rehearse
from fwd.models.safetensors import headers

LAST = "model.layers.1.mlp.down_proj"
NAN = float("nan")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("rehearsal") / "llama"
    checkpoints.make("llama", path)
    return path


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def quantise(source_folder, layout, folder):
    quantised.quantise(source_folder, layout, folder / "quantised", folder / "plain")
    return folder / "quantised"


class Guard:
    """Counts what is allocated with memory behind it and where files are read, after the headers."""

    def __init__(self, monkeypatch):
        self.allocated, self.read = 0, []
        self._empty, self._empty_like, self._fill = torch.empty, torch.empty_like, module.fill
        monkeypatch.setattr(source.torch, "empty", self.empty)
        monkeypatch.setattr(module.torch, "empty_like", self.empty_like)
        monkeypatch.setattr(module, "fill", self.fill)
        monkeypatch.setattr(loading, "Checkpoint", None)  # the one that reads weights

    def empty(self, *shape, **options):
        out = self._empty(*shape, **options)
        self.allocated += 0 if out.is_meta else out.nbytes
        return out

    def empty_like(self, *arguments, **options):
        out = self._empty_like(*arguments, **options)
        self.allocated += out.nbytes
        return out

    def fill(self, shard, begin, into):
        self.read += [name for name, entry in shard.entries.items() if entry.begin == begin]
        self._fill(shard, begin, into)


def refusal(folder, monkeypatch, **options):
    """The message, and which tensors were read until then: those of scales alone, and no more was allocated."""
    guard, seen = Guard(monkeypatch), []
    with pytest.raises(ModelError) as refused:
        load(folder, progress=lambda done, _total: seen.append(done), **options)
    entries = headers(folder)
    assert not any(seen)
    assert "\n" not in refused.value.message
    assert not [name for name in guard.read if name.endswith((".weight", "_packed", "qweight", "_blocks"))]
    assert guard.allocated <= sum(entries[name].nbytes for name in guard.read) + (2 << 10)  # and the table of RoPE
    return refused.value.message


FAULTS = {
    "missing": (lambda own: own.pop(f"{LAST}.weight"), f"{LAST}.weight is missing"),
    "missing norm": (lambda own: own.pop("model.norm.weight"), "model.norm.weight is missing"),
    "left over": (lambda own: own.update({"zebra": torch.ones(3)}), "tensor zebra has no place"),
    "shape": (lambda own: own.update({f"{LAST}.weight": torch.ones(64, 95)}), "has shape [64, 95], expected [64, 96]"),
    "dtype": (lambda own: own.update({"model.norm.weight": torch.ones(64).double()}), "has dtype F64, expected one of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_headers_tell_is_refused_before_a_byte_is_read(fault, plain, tmp_path, monkeypatch):
    change, named = FAULTS[fault]
    folder = shutil.copytree(plain, tmp_path / "model")
    edit(folder, change)
    assert named in refusal(folder, monkeypatch)


def test_mixed_formats_in_one_matrix_are_refused_before_a_weight_is_read(plain, tmp_path, monkeypatch):
    folder = quantise(plain, "fp8-channel", tmp_path)

    def mix(tensors):
        name = "model.layers.1.self_attn.k_proj.weight"
        tensors.pop(f"{name}_scale")
        tensors[name] = tensors[name].float()

    edit(folder, mix)
    assert "k_proj plain: they are one matrix here, of one format" in refusal(folder, monkeypatch)


def last_of(tensor, value):
    """The tensor with another last number; bytes stand for a float of 8 bits."""
    flat = tensor.clone().contiguous().reshape(-1)
    (flat.view(torch.uint8) if isinstance(value, bytes) else flat)[-1] = value[0] if isinstance(value, bytes) else value
    return flat.view(tensor.shape)


def wrong_scales():
    """For each layout the suffix of its scales, values that are none, and the reason."""
    for layout in quantised.LAYOUTS:
        kind = layout.partition("-")[0]
        if kind == "fp8":
            suffix = ".weight_scale_inv" if layout in {"fp8-deepseek", "fp8-mistral"} else ".weight_scale"
            faults = [(NAN, "not finite"), (float("inf"), "not finite"), (-1.0, "negative")]
        elif kind == "mxfp4":
            suffix, faults = ".weight_scale", [(b"\xff", "NaN")]
        elif kind == "nvfp4":
            suffix, faults = ".weight_scale", [(b"\x7f", "not finite"), (b"\x88", "negative")]
            factor = ".weight_global_scale" if layout == "nvfp4-compressed" else ".weight_scale_2"
            yield from ((layout, factor, value, "is no scale") for value in (0.0, NAN))
        else:
            suffix = ".weight_scale" if "compressed" in layout else ".scales"
            faults = [(NAN, "not finite"), (float("-inf"), "not finite")]
        yield from ((layout, suffix, value, reason) for value, reason in faults)
    yield from ((layout, ".weight_shape", 7, "is not [64, 96]") for layout in quantised.LAYOUTS if "int4" in layout)
    yield "gptq-order", ".g_idx", 99, "group"
    yield "int4-compressed-order", ".weight_g_idx", -1, "group"
    yield "gptq", ".g_idx", 0, "desc_act"


@pytest.mark.parametrize(("layout", "suffix", "value", "reason"), list(wrong_scales()), ids=str)
def test_scales_of_the_last_matrix_are_refused_before_a_weight_is_read(
    layout, suffix, value, reason, plain, tmp_path, monkeypatch
):
    folder = quantise(plain, layout, tmp_path)
    edit(folder, lambda tensors: tensors.update({LAST + suffix: last_of(tensors[LAST + suffix], value)}))
    message = refusal(folder, monkeypatch)
    assert f"{folder / 'model.safetensors'}: {LAST}{suffix} " in message
    assert reason in message


@pytest.mark.parametrize(("layout", "suffix"), [("gptq-order", ".g_idx"), ("int4-compressed-order", ".weight_g_idx")])
def test_another_order_in_one_matrix_is_refused_before_a_weight_is_read(layout, suffix, plain, tmp_path, monkeypatch):
    folder = quantise(plain, layout, tmp_path)
    name = f"model.layers.1.self_attn.v_proj{suffix}"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].roll(1)}))
    assert f"{name} is another order" in refusal(folder, monkeypatch)


def test_biases_that_a_model_lacks_are_refused_before_a_weight_is_read(plain, tmp_path, monkeypatch):
    folder = quantise(plain, "gptq", tmp_path)
    edit(folder, lambda tensors: tensors.update({f"{LAST}.bias": torch.tensor([0.0] * 63 + [1.0])}))
    assert f"{LAST}.bias is not zero" in refusal(folder, monkeypatch)


def test_scales_of_experts_in_one_tensor_are_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    folder = mxfp4_of_gpt_oss(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    edit(folder, lambda tensors: tensors.update({name: last_of(tensors[name], 255)}))
    assert f"{name} holds a scale that is NaN" in refusal(folder, monkeypatch)


def mxfp4_of_gpt_oss(folder):
    checkpoints.make("gpt-oss", folder / "source")
    quantised.quantise_gpt_oss(folder / "source", folder / "model", folder / "plain")
    return folder / "model"


class Recorded(Rehearsal):
    """Keeps what was taken."""

    def __init__(self, folder):
        super().__init__(folder)
        self.taken = []

    def _read(self, names, parts):
        self.taken += names


class Counted(loading.Checkpoint):
    taken: list[str]

    def _read(self, names, parts):
        self.taken = [*getattr(self, "taken", []), *names]
        type(self).last = self
        super()._read(names, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_takes_what_the_load_takes(kind, tmp_path, monkeypatch):
    """In the same order; so nothing that the load refuses is new."""
    checkpoints.make(kind, tmp_path)
    agree(tmp_path, monkeypatch)


@pytest.mark.parametrize("layout", quantised.LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen3-moe", "deepseek"])
def test_a_rehearsal_of_quantised_weights_takes_what_the_load_takes(kind, layout, tmp_path, monkeypatch):
    checkpoints.make(kind, tmp_path / "source")
    agree(quantise(tmp_path / "source", layout, tmp_path), monkeypatch)


def agree(folder, monkeypatch):
    recorded = []
    monkeypatch.setattr(module, "Rehearsal", lambda path: recorded.append(Recorded(path)) or recorded[-1])
    monkeypatch.setattr(loading, "Checkpoint", Counted)
    load(folder, dtype="float32")
    assert recorded[0].taken == Counted.last.taken
    assert recorded[0].taken


def test_many_scales_are_read_some_at_once_and_one_that_is_wrong_is_named(tmp_path, monkeypatch):
    checkpoints.make("qwen3-moe", tmp_path / "source")
    folder = quantise(tmp_path / "source", "nvfp4-modelopt", tmp_path)
    experts = sorted(name for name in headers(folder) if name.endswith("down_proj.weight_scale"))
    for step in (1, 300, 1 << 20):
        monkeypatch.setattr(source, "BATCH", step)
        for name in experts[::5]:
            broken = shutil.copytree(folder, tmp_path / f"{step}-{name}")
            edit(broken, lambda tensors, name=name: tensors.update({name: last_of(tensors[name], b"\x7f")}))
            with pytest.raises(ModelError, match=f"{name} holds a scale that is not finite"):
                load(broken)


def test_a_rehearsal_leaves_no_thread_and_no_file(plain):
    def held():
        return {path for folder in ("fd", "task") for path in Path(f"/proc/self/{folder}").iterdir()}

    before, spec = held(), run_spec(read_spec(plain), "float32")
    rehearse(plain, lambda checkpoint, ops: loading.Dense(spec, ops, torch.float32, checkpoint, 1))
    with pytest.raises(ZeroDivisionError):
        rehearse(plain, lambda _checkpoint, _ops: 1 // 0)
    assert held() <= before


SLOW = """
import sys
from pathlib import Path
from pathlib import Path
import torch
from fwd.models import load as loading
from fwd.models.config import read_spec
from fwd.models.rehearsal import rehearse
for folder in map(Path, sys.argv[1:]):
    spec = read_spec(folder)
    rehearse(folder, lambda source, ops: loading.FAMILIES[spec.family](spec, ops, torch.float32, source, 1))
    assert "torch._dynamo" not in sys.modules, folder
"""


def test_torch_brings_no_compiler_for_shapes(plain, tmp_path):
    """Which some operations of tensors without memory do: seconds, and a hundred megabytes."""
    checkpoints.make("deepseek", tmp_path / "deepseek")
    folders = [mxfp4_of_gpt_oss(tmp_path)]
    for layout in quantised.LAYOUTS:
        for number, kind in enumerate((plain, tmp_path / "deepseek")):
            folders.append(quantise(kind, layout, tmp_path / f"{layout}-{number}"))
    subprocess.run([sys.executable, "-c", SLOW, *map(str, folders)], check=True)
