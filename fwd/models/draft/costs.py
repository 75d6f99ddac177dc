"""What the weights of a draft model take, as kernels stream them and as the reference keeps them. No torch here."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fwd.kernels import sizes as bytes_of
from fwd.models.draft.spec import DraftSizes
from fwd.models.spec import EMBEDDING, HEAD, ITEMSIZE, LAYER, Held, ModelSpec, Part, held_of, parts
from fwd.models.streamed import streamed

FILL = 8  # inputs that stand beside two rows that are normed apart (`fwd.models.draft.eagle.joined`)


def sizes(
    spec: ModelSpec, needed: Iterable[Part], target: ModelSpec, *, width: int, logits: int = 0
) -> tuple[DraftSizes, DraftSizes]:
    """Return what these parts of a model take in the reference, and as kernels; `width` and `logits` are of a row."""
    held = [held_of(spec, part) for part in needed if part.numbers]
    reference, kernels = _reference(spec, held), _kernels(spec, held)
    spaces = sum(_spaces(spec).get(key, 0) for key in _spaces(spec).keys() - _spaces(target).keys())
    return (
        DraftSizes(*reference, width=width, logits=logits),
        DraftSizes(*kernels, width=width, spaces=spaces, logits=logits),
    )


def vectors(count: int) -> Part:
    """So many numbers of norms and biases."""
    return Part("", (count,), kept="model")


def layer_parts(spec: ModelSpec, prefix: str, *, mixed: bool = False) -> Iterator[Part]:
    """What one more block of a model is made of, whose tensors begin with `prefix`; `mixed`: it has experts."""
    moe = replace(spec.moe, layers=(0,) if mixed else ()) if spec.moe else None
    one = replace(spec, layers=1, windows=spec.windows[:1], moe=moe, tied=True, requant=spec.requant - {"fp8-head"})
    _, *inner, _ = parts(one)  # without embedding and last norm
    return (part._replace(module=part.module.replace(LAYER.format(0), prefix)) for part in inner)


def widest(spec: ModelSpec) -> int:
    """Numbers of a row in a layer: what goes in and out of its attention, and of its MLP or experts."""
    mixed = 0
    if moe := spec.moe:
        mixed = moe.top_k * (3 * moe.intermediate + 2 * spec.hidden) + 3 * moe.shared
    return 4 * spec.hidden + 4 * spec.qkv_width + max(3 * spec.intermediate, mixed)


def _spaces(spec: ModelSpec) -> dict[tuple[object, ...], int]:
    """Bytes that the launches of a decode step leave for each other, by the shapes they are for."""
    found: dict[tuple[object, ...], int] = {}
    if mla := spec.mla:
        key = (spec.heads, mla.q_rank, mla.latent, mla.nope, mla.rope)
        found["latents", *key] = bytes_of.latent_bytes(*key)
    else:
        heads, own = spec.heads + 2 * spec.kv_heads, (spec.heads, spec.kv_heads, spec.head_dim)
        found["projection", heads, spec.head_dim] = bytes_of.projection_bytes(heads, spec.head_dim)
        found["split", *own] = bytes_of.split_bytes(*own)
    if moe := spec.moe:
        mixture = (spec.hidden, moe.experts, moe.top_k)
        found["mixture", *mixture] = bytes_of.mixture_bytes(*mixture)
    return found


def _kernels(spec: ModelSpec, held: list[Held]) -> tuple[int, int]:
    """Bytes of all, and beside them while one is packed."""
    each = [streamed(one, shared=spec.shares) for one in held]
    return sum(one.nbytes * one.held.part.copies for one in each), max(one.beside for one in each)


def _reference(spec: ModelSpec, held: list[Held]) -> tuple[int, int]:
    """The same; a plain head is float32 there, beside the embedding if it is the same."""
    total = sum(one.nbytes * one.part.copies for one in held)
    heads = (HEAD, EMBEDDING) if spec.shares else (HEAD,)
    head = next((one for one in held if one.part.module in heads), None)
    if head is None or head.stored is not None:
        return total, head.nbytes if head else 0
    read, wide = head.nbytes * (head.part.module == HEAD), head.part.numbers * ITEMSIZE["float32"]
    return total - read + wide, read + wide * (spec.dtype != "float32")
