"""Which device serves a model, and the one line where the one that was asked for cannot."""

from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs
from test_gpu import H100

from fwd.engine import start
from fwd.errors import ConfigError, FwdError, KernelError
from fwd.kernels import jit, nvrtc
from fwd.kernels.builds import Bound
from fwd.kernels.device import Shape
from fwd.kernels.gpu import Facts
from fwd.kernels.select import resolve
from fwd.models.config import read_spec, run_spec
from fwd.models.load import shape
from fwd.protocol.messages import Load

SHAPE = Shape("bfloat16", hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256)
A100 = replace(H100, capability=(8, 0), name="NVIDIA A100")


@pytest.fixture
def no_kernels(monkeypatch, tmp_path):
    """No compiler, and nothing in the cache."""

    def absent():
        raise KernelError("NVRTC is not installed")

    monkeypatch.setattr(nvrtc, "_nvrtc", absent)
    monkeypatch.setattr(jit, "BUILDS", {"gemv.cu": {"some": Bound(32)}})
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))


def chosen(device, facts, wanted=SHAPE):
    """The kind, and what was logged."""
    with capture_logs() as lines:
        kind = resolve(device, wanted, facts)
    return kind, [line["reason"] for line in lines]


def test_auto_is_a_gpu_that_serves_the_model():
    assert chosen("auto", H100) == ("cuda", [])
    assert chosen("cuda", H100) == ("cuda", [])
    assert chosen("cpu", H100) == ("cpu", [])


def test_auto_is_silently_the_cpu_where_no_gpu_is():
    assert chosen("auto", Facts()) == ("cpu", [])
    assert chosen("auto", replace(A100, visible=False)) == ("cpu", [])


@pytest.mark.parametrize(
    ("facts", "wanted", "said"),
    [
        (A100, SHAPE, "this is NVIDIA A100 (8.0): use --device cpu"),
        (Facts(visible=True), SHAPE, "no CUDA driver"),
        (replace(H100, missing=("cupy-cuda13x",)), SHAPE, "cupy-cuda13x must be installed"),
        (H100, replace(SHAPE, dtype="float32"), "bfloat16"),
        (H100, replace(SHAPE, head_dim=96), "head_dim"),
    ],
    ids=["capability", "driver", "package", "dtype", "shape"],
)
def test_a_gpu_that_is_not_used_is_said_once_and_refused_by_name(facts, wanted, said):
    kind, (reason,) = chosen("auto", facts, wanted)
    assert kind == "cpu"
    assert said in reason
    with pytest.raises(FwdError) as caught:
        resolve("cuda", wanted, facts)
    assert caught.value.message.replace("--device cuda", "--device auto") == reason.replace(
        "--device cuda", "--device auto"
    )
    assert caught.value.exit_code == (6 if wanted is SHAPE else 2)


def test_kernels_that_cannot_be_had(no_kernels):
    assert chosen("auto", H100) == ("cpu", ["NVRTC is not installed"])
    with pytest.raises(KernelError, match="NVRTC is not installed"):
        resolve("cuda", SHAPE, H100)


def test_an_unknown_device():
    with pytest.raises(ConfigError, match="unknown device 'tpu': use auto, cuda, cpu, host"):
        resolve("tpu", SHAPE, Facts())


@pytest.fixture
def load(monkeypatch):
    """A load of the embedded model, for a GPU of which others hold nearly everything."""
    monkeypatch.setattr(start, "held", lambda _: "taken by pid 7")
    folder = start.Path(start.__file__).parents[1] / "demo/model"
    assert shape(run_spec(read_spec(folder), "auto")).dtype == "bfloat16"
    return Load(model=str(folder), device="cuda")


def test_a_model_that_would_fit_without_others_names_them(load, monkeypatch):
    with pytest.raises(
        KernelError, match=r"does not fit: it needs .* and NVIDIA H100 80GB HBM3 has 1,000; taken by pid 7"
    ):
        start.plan_load(load, replace(H100, free=1000))
    monkeypatch.setattr(start, "held", lambda _: "")
    with pytest.raises(ConfigError, match=r"and NVIDIA H100 80GB HBM3 has 1,000$"):
        start.plan_load(load, replace(H100, free=1000))


def test_a_model_that_fits_is_planned_for_what_is_free(load):
    assert start.plan_load(load, H100).device.memory == H100.free


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 …\nmore"),
            "CUDA out of memory; taken",
        ),
        (
            RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore"),
            "CUDA error: uncorrectable ECC error .*; see",
        ),
    ],
)
def test_a_gpu_that_fails_while_a_model_is_loaded_is_one_line(load, monkeypatch, error, line):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(start, "probe", lambda: H100)
    monkeypatch.setattr(start, "load_model", failing)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    with pytest.raises(KernelError, match=f"^NVIDIA H100 80GB HBM3 failed: {line}") as caught:
        start.start(load, None, lambda *_: None, 0.0)
    assert "\n" not in caught.value.message
