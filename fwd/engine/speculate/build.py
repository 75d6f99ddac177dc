"""The drafter of a plan beside its loaded model."""

import structlog
import torch

from fwd.engine.plan import Plan
from fwd.engine.runner import Prefiller
from fwd.engine.space import Space
from fwd.engine.speculate.neural import Neural
from fwd.errors import ModelError
from fwd.models.draft.load import load_draft
from fwd.models.draft.smoke import notes
from fwd.models.model import Model
from fwd.protocol.messages import Load

log = structlog.get_logger("fwd.engine")


def neural_of(
    load: Load, planned: Plan, model: Model, runner: Prefiller, space: Space
) -> tuple[Neural | None, tuple[str, ...]]:
    """Load the drafter of a plan, if there is one, and have it see what the runner launches; and notes for users.

    Raises `ModelError` for what is wrong with one that was asked for; one that the model came with is left out then.
    """
    if planned.draft is None:
        return None, ()
    context = min(planned.context, planned.draft.context)
    try:
        loaded = load_draft(planned.draft, model, context)
    except ModelError as error:
        if load.draft_model:
            raise
        log.warning("drafter_left_out", reason=error.message)
        return None, (f"no drafter: {error.message}",)
    found = notes(model, loaded, context)
    if planned.device.gpu:  # what packing took
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    drafter = Neural(loaded, planned, lambda: runner.copy(space.take_copies()))
    runner.follow(drafter)
    return drafter, found
