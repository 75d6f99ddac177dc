"""fwd: one model on one machine, answering one tenant as fast as the memory allows."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwd.protocol.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in {"AsyncClient", "Client"}:
        from fwd.protocol import client  # noqa: PLC0415  # `import fwd` stays as light as the daemon's start needs

        return getattr(client, name)
    raise AttributeError(f"module 'fwd' has no attribute {name!r}")
