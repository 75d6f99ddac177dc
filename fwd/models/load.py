"""A model folder becomes a Model: config → spec → checkpoint → weights on the device."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
import torch

from fwd.kernels.device import LatentShape, Mixture, Shape
from fwd.kernels.select import resolve, select
from fwd.models.checkpoint import Checkpoint, Progress
from fwd.models.config import read_spec, run_spec
from fwd.models.deepseek import DeepSeek
from fwd.models.dense import Dense
from fwd.models.gpt_oss import GptOss
from fwd.models.model import Model
from fwd.models.moe import Moe
from fwd.models.rehearsal import rehearse
from fwd.models.source import Source
from fwd.models.spec import Family, ModelSpec
from fwd.models.streamed import sources_of

FAMILIES: dict[Family, Callable[[ModelSpec, Any, torch.dtype, Source, int], Model]] = {
    "deepseek": DeepSeek,
    "dense": Dense,
    "gpt_oss": GptOss,
    "moe": Moe,
}  # `kernels.device.check` has refused what an execution of the ops does not take
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = structlog.get_logger("fwd.models")


def load(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    requant: Sequence[str] = (),
    progress: Progress = lambda _done, _total: None,
) -> Model:
    """Load a Hugging Face folder for up to `context` positions; `progress` gets bytes done and in total.

    What `requant` names (`fwd.models.spec.REQUANT`) becomes FP8 where it is plain.

    Raises ModelError for anything wrong with the folder, and what `fwd.kernels.select` raises for the device.
    """
    spec = run_spec(read_spec(folder), dtype, requant)
    kind, family, numbers = resolve(device, shape(spec)), FAMILIES[spec.family], DTYPES[spec.dtype]
    rehearse(folder, lambda rehearsal, unpacked: family(spec, unpacked, numbers, rehearsal, 1))
    ops = select(kind, shape(spec))
    with Checkpoint(folder, progress) as checkpoint:
        model = family(spec, ops, numbers, checkpoint, min(context or spec.max_context, spec.max_context))
    if spec.mtp > len(model.kept):
        log.info("mtp_layers_absent", announced=spec.mtp, found=len(model.kept))
    return model


def shape(spec: ModelSpec) -> Shape:
    """What kernels must know of a model to take it."""
    moe, mla = spec.moe, spec.mla
    return Shape(
        dtype=spec.dtype,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.vocab,
        products=sources_of(spec),
        mixture=Mixture(moe.experts, moe.top_k, moe.groups, moe.intermediate, moe.shared) if moe else None,
        latents=LatentShape(spec.heads, mla.q_rank, mla.latent, mla.nope, mla.rope) if mla else None,
    )
