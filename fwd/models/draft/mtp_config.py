"""Layers of a checkpoint that predict further tokens, as DeepSeek-V3 stores them (README_WEIGHTS.md). No torch here.

GLM-4.5 and later have the same names. The first of several is fed again, as those who serve these models do it.
"""

from dataclasses import dataclass
from pathlib import Path

from fwd.errors import ModelError
from fwd.models.draft.costs import layer_parts, sizes, vectors, widest
from fwd.models.draft.spec import DraftSpec
from fwd.models.layout import CacheLayout, Latent, Paged
from fwd.models.safetensors import headers
from fwd.models.spec import LAYER, ModelSpec, Part

PROJECTION, ROUTER = "eh_proj", "mlp.gate.weight"
NEEDED = ("eh_proj", "enorm", "hnorm", "shared_head.norm")
UNUSED = ("embed_tokens.weight", "shared_head.head.weight", "rotary_emb.inv_freq")  # copies of the target's


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpSpec(DraftSpec):
    """Which layer it is, and whether it has experts."""

    target: ModelSpec
    layer: int
    mixed: bool

    @property
    def prefix(self) -> str:
        """What stands before the names of its tensors, behind the target's own prefix."""
        return LAYER.format(self.layer)


def read_mtp(folder: Path, target: ModelSpec) -> MtpSpec | None:
    """Return the first of the layers that predict further tokens in a target's folder; None where there are none.

    Raises ModelError for one that is not whole.
    """
    if not target.mtp:
        return None
    prefix, names = LAYER.format(target.layers), headers(folder)
    full = target.prefix + prefix
    if not any(name.startswith(full) for name in names):
        return None
    for module in NEEDED:
        if not any(name.startswith(f"{full}{module}.") for name in names):
            raise ModelError(f"{folder}: {full}{module} is missing: use --draft-model none to do without this layer")
    mixed = f"{full}{ROUTER}" in names
    needed = [*layer_parts(target, prefix, mixed=mixed), vectors(3 * target.hidden)]
    needed.append(Part(prefix + PROJECTION, (target.hidden,), 2 * target.hidden))
    reference, kernels = sizes(target, needed, target, width=widest(target))
    return MtpSpec(
        kind="mtp",
        folder=folder,
        shift=1,
        block=1,
        taps=(target.layers - 1,),
        features=target.hidden,
        hidden=target.hidden,
        cache=(_layout(target),),
        context=target.max_context,
        rotated=target.rotated,
        reference=reference,
        kernels=kernels,
        notes=_notes(target.mtp),
        target=target,
        layer=target.layers,
        mixed=mixed,
    )


def _layout(target: ModelSpec) -> CacheLayout:
    """The cache of one layer."""
    if target.mla:
        return Latent((0,), target.mla.latent, target.mla.rope)
    return Paged((0,), target.kv_heads, target.head_dim)


def _notes(layers: int) -> tuple[str, ...]:
    return () if layers == 1 else (f"mtp: the first of {layers} layers is fed again",)
