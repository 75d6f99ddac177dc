"""A drafter that was read becomes a DraftModel beside its loaded target."""

from typing import cast

from fwd.models.draft.config import LanguageSpec
from fwd.models.draft.dflash import DFlash
from fwd.models.draft.dflash_config import DFlashSpec
from fwd.models.draft.eagle import Eagle
from fwd.models.draft.eagle_config import EagleSpec
from fwd.models.draft.language import Language
from fwd.models.draft.model import DraftModel
from fwd.models.draft.mtp import Mtp
from fwd.models.draft.mtp_config import MtpSpec
from fwd.models.draft.shared import Target
from fwd.models.draft.spec import DraftSpec
from fwd.models.model import Model


def load_draft(spec: DraftSpec, target: Model, context: int) -> DraftModel:
    """Load the drafter of a loaded target, whose ops it uses; its tables hold `context` positions.

    Raises ModelError for what is wrong with its files, or for layers that the target's kernels do not take.
    """
    assert 0 < context <= spec.context, (context, spec.context)
    decoder = cast("Target", target)  # all models are
    match spec:
        case LanguageSpec():
            return Language(spec, decoder, context)
        case MtpSpec():
            return Mtp(spec, decoder)
        case EagleSpec():
            return Eagle(spec, decoder, context)
        case DFlashSpec():
            return DFlash(spec, decoder, context)
    raise AssertionError(spec.kind)
