"""Which execution of the ops serves a device."""

from fwd.errors import ConfigError
from fwd.kernels.ops import Ops
from fwd.kernels.reference import Reference


def select(device: str) -> Ops:
    """Return the ops for `--device`; raises ConfigError for a device that this build has no kernels for."""
    if device in {"auto", "cpu"}:
        return Reference()
    if device in {"cuda", "host"}:
        raise ConfigError(f"this build has no {device} kernels yet: use --device cpu")
    raise ConfigError(f"unknown device {device!r}: use auto or cpu")
