"""How the weights of a model stand where there are kernels: in which stream, and what that takes. No torch here."""

from typing import NamedTuple

from fwd.kernels import streams
from fwd.models.spec import EMBEDDING, HEAD, Held, ModelSpec

ROUTERS = ("mlp.gate", "mlp.router")


class Streamed(NamedTuple):
    """What is held, its stream (empty: it is not packed), the bytes of one copy, and why it is in bfloat16 if it is."""

    held: Held
    stream: str
    nbytes: int
    reason: str = ""


def streamed(spec: ModelSpec) -> tuple[Streamed, ...]:
    """Return everything that is loaded of a model in bfloat16, as kernels have it."""
    return tuple(_streamed(spec, held) for held in spec.held)


def fallbacks(spec: ModelSpec) -> tuple[str, ...]:
    """Return which quantised matrices no kernel takes: they are made bfloat16 when they are loaded. A line a reason."""
    found: dict[str, list[str]] = {}
    for held, _, _, reason in streamed(spec):
        if reason:
            found.setdefault(reason, []).append(spec.prefix + held.part.module)
    return tuple(_line(reason, modules) for reason, modules in found.items())


def streams_of(spec: ModelSpec) -> tuple[str, ...]:
    """Return the streams that a model has, each once, in order."""
    return tuple(sorted({stream for _, stream, _, _ in streamed(spec) if stream}))


def _line(reason: str, modules: list[str]) -> str:
    others = f" and {len(modules) - 1} more" if modules[1:] else ""
    return f"{modules[0]}{others} in bfloat16: {reason}"


def _streamed(spec: ModelSpec, held: Held) -> Streamed:
    part, module = held.part, held.part.module
    embedding = module == EMBEDDING
    if not module or (embedding and not spec.tied) or (part.kept == "model" and not embedding):
        return Streamed(held, "", held.nbytes)
    reason = _reason(held)
    stored = None if reason else held.stored
    stream = "bf16" if stored is None else streams.stream_of(stored.format, stored.block, part.inputs)
    return Streamed(held, stream, streams.packed_bytes(stream, sum(part.heights), part.inputs), reason)


def _reason(held: Held) -> str:
    """Why a quantised matrix becomes bfloat16."""
    stored, part = held.stored, held.part
    if stored is None:
        return ""
    if part.module == HEAD and stored.format not in streams.HEADS:
        return f"a head in {stored.format}"
    if part.module.endswith(ROUTERS):
        return f"a router in {stored.format}"
    outputs = sum(part.heights)
    return streams.refusal(stored.format, stored.block, outputs, part.inputs, ordered=stored.groups) or ""
