"""How the weights of a model stand where there are kernels: in which stream, and what that takes. No torch here."""

from typing import NamedTuple

from fwd.kernels import streams
from fwd.models.spec import EMBEDDING, HEAD, Held, ModelSpec

ROUTERS, EXPERTS, SHARED = ("mlp.gate", "mlp.router"), "mlp.experts.", "mlp.shared_experts."


class Streamed(NamedTuple):
    """What is held, its stream (empty: it is not packed), the bytes of one copy, and why it is in bfloat16 if it is."""

    held: Held
    stream: str
    nbytes: int
    reason: str = ""

    @property
    def format(self) -> str:
        """What it is held in."""
        return "bfloat16" if self.stream == "bf16" else self.held.format

    @property
    def beside(self) -> int:
        """Bytes beside it while it is packed: what was read, its numbers rounded, what is looked for in one copy."""
        part = self.held.part
        rounded = 2 * part.numbers * part.copies if self.reason else 0
        once = self.nbytes if self.stream == "bf16" else 3 * self.held.nbytes
        return self.held.nbytes * part.copies + rounded + once if self.stream else 0


def streamed(held: Held, *, shared: bool) -> Streamed:
    """Return how kernels have something that is loaded of a model in bfloat16; `shared`: its head is the embedding."""
    part, module = held.part, held.part.module
    embedding = module == EMBEDDING
    if not module or (embedding and not shared) or (part.kept == "model" and not embedding):
        return Streamed(held, "", held.nbytes)
    reason = _reason(held)
    stored = None if reason else held.stored
    stream = "bf16" if stored is None else streams.stream_of(stored.format, stored.block, part.inputs)
    return Streamed(held, stream, streams.packed_bytes(stream, sum(part.heights), part.inputs), reason)


def fallbacks(spec: ModelSpec) -> tuple[str, ...]:
    """Return which quantised matrices no kernel takes: they are made bfloat16 when they are loaded. A line a reason."""
    found: dict[str, list[str]] = {}
    for held, _, _, reason in spec.streamed:
        if reason:
            found.setdefault(reason, []).append(spec.prefix + held.part.module)
    return tuple(_line(reason, modules) for reason, modules in found.items())


def sources_of(spec: ModelSpec) -> tuple[str, ...]:
    """Return the files of the kernels over the weights of a model, each once."""
    return tuple(dict.fromkeys(_source(each.held, each.stream) for each in spec.streamed if each.stream))


def _source(held: Held, stream: str) -> str:
    module = held.part.module
    if module.endswith(ROUTERS):
        return "route.cu"
    if EXPERTS in module or SHARED in module:
        return f"experts_{stream}.cu"
    latents = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "q_proj")
    family = "gemv"
    if module.endswith("self_attn.q_proj") and len(held.part.heights) > 1:
        family = "qkv"
    elif "self_attn." in module and module.endswith(latents):
        family = "latent_qkv"
    return f"{family}.cu" if stream == "bf16" else f"{family}_{stream}.cu"


def _line(reason: str, modules: list[str]) -> str:
    others = f" and {len(modules) - 1} more" if modules[1:] else ""
    return f"{modules[0]}{others} in bfloat16: {reason}"


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
