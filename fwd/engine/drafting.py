"""Which drafter a model gets, and the plan for both. No torch here.

What a model comes with is left out, and it is said why, where it cannot be used; one that was asked for is refused.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fwd.engine.device import Device
from fwd.engine.plan import FP8_BLOCK, Plan, plan, vector_of
from fwd.errors import ConfigError, ModelError
from fwd.models.draft.config import read_draft
from fwd.models.draft.spec import DraftSpec
from fwd.models.layout import groups
from fwd.models.spec import ModelSpec

Make = Callable[..., Plan]


def plan_drafting(
    wanted: str,
    folder: Path,
    spec: ModelSpec,
    device: Device,
    *,
    context: int = 0,
    max_seqs: int = 16,
    kv_dtype: str = "auto",
    kv_bytes: int = 0,
    corpus: int = 0,
) -> Plan:
    """Plan the model in `folder` as `plan` does, with the drafter that `--draft-model` names (`wanted`) beside it.

    Raises `ModelError` for a drafter that is not for this model, and what `plan` raises.
    """
    make = partial(
        plan,
        spec,
        device,
        context=context,
        max_seqs=max_seqs,
        kv_dtype=kv_dtype,
        kv_bytes=kv_bytes,
        corpus=corpus,
    )
    try:
        draft = read_draft(wanted, folder, spec)
        return _planned(draft, spec, make)
    except (ModelError, ConfigError) as error:
        if wanted:
            raise
        planned = make()  # raises the same where it is not the drafter's fault
        return replace(planned, draft_notes=(f"no drafter: {error.message}",))


def _planned(draft: DraftSpec | None, spec: ModelSpec, make: Make) -> Plan:
    if draft is None:
        return make()
    if groups(spec.cache)[0].kind != "full":
        raise ModelError(
            f"draft_model: {spec.architecture} keeps no whole sequences, whose pages a drafter would share"
        )
    planned = make(draft=draft)
    wrong = next((vector_of(layout) for layout in draft.cache if vector_of(layout) % FP8_BLOCK), 0)
    if planned.kv == "fp8" and wrong:
        raise ConfigError(
            f"kv-dtype: fp8 needs vectors of a multiple of {FP8_BLOCK}, the drafter has {wrong}: use bfloat16, or"
            " --draft-model none"
        )
    return replace(planned, draft_notes=draft.notes)
