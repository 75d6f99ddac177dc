"""Which execution of the ops serves a device."""

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import structlog

from fwd.errors import ConfigError, FwdError, KernelError
from fwd.kernels import device as kernels
from fwd.kernels import gxx, sources
from fwd.kernels.cuda import CudaLauncher
from fwd.kernels.device import DeviceOps, Shape
from fwd.kernels.gpu import Facts, probe, usable
from fwd.kernels.host import HostLauncher
from fwd.kernels.jit import Jit
from fwd.kernels.ops import Ops
from fwd.kernels.reference import Reference

Kind = Literal["cpu", "host", "cuda"]
DEVICES = ("auto", "cuda", "cpu", "host")

log = structlog.get_logger("fwd.kernels")


def resolve(device: str, shape: Shape, facts: Facts | None = None) -> Kind:
    """Return what `--device` means here for a model: `auto` is a GPU that can serve it, else the CPU.

    Raises ConfigError, ModelError or KernelError, in one line with a way out, if the device was named and cannot.
    """
    match device:
        case "cpu":
            return "cpu"
        case "host":
            kernels.check(device, shape)
            return "host"
        case "cuda":
            _refuse_unusable(facts or probe())
            kernels.check(device, shape)
            return "cuda"
        case "auto":
            return _auto(shape, facts or probe())
    raise ConfigError(f"unknown device {device!r}: use {', '.join(DEVICES)}")


def select(kind: Kind, shape: Shape) -> Ops:
    """Return the ops of what `resolve` gave for a model; raises KernelError where they cannot be had."""
    match kind:
        case "cpu":
            return Reference()
        case "host":
            with ThreadPoolExecutor() as pool:
                list(pool.map(gxx.build, (sources.home() / source for source in kernels.sources(shape))))
            return DeviceOps(HostLauncher())
        case "cuda":
            return DeviceOps(CudaLauncher())


def _auto(shape: Shape, facts: Facts) -> Kind:
    """The GPU if it can serve the model; why it does not is logged where there is one."""
    try:
        _refuse_unusable(facts)
        kernels.check("cuda", shape)
    except FwdError as error:
        reason = error.message
    else:
        return "cuda"
    if facts.visible:
        log.warning("gpu_unused", reason=reason)
    return "cpu"


def _refuse_unusable(facts: Facts) -> None:
    if reason := usable(facts) or Jit().trouble(facts.arch):
        raise KernelError(reason)
