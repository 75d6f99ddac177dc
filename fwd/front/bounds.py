"""Whether a request can be served at all: ids of the vocabulary, a context that holds it, definite limits."""

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from fwd.errors import BadRequestError, ContextLengthError
from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Draft, EngineInfo

INLINE = 1024
MAX_DRAFT = 15  # rows of the largest step but one
MAX_SCORES = 1 << 22  # of prompt tokens and those beside them, some 300 MB in the journal


def bounded(submits: Sequence[Submit], info: EngineInfo) -> list[Submit]:
    """The requests with definite limits; each prompt is looked through once, however many choices it has.

    Raises `ContextLengthError` or `BadRequestError`.
    """
    found = [_bounded(submit, info) for submit in submits]
    _check_scores(submits)
    for prompt in {id(submit.prompt): submit.prompt for submit in submits}.values():
        _check_ids(_extremes(prompt), info, "prompt")
    for prediction in {id(submit.prediction): submit.prediction for submit in submits}.values():
        _check_ids(_extremes(prediction[: 4 * info.context]), info, "prediction")
    return found


def notes(asked: Submit, taken: Submit) -> tuple[str, ...]:
    """What was taken as less than was asked: it changes the speed and no token."""
    found = []
    if asked.draft.max_draft > taken.draft.max_draft:
        found.append(f"max_draft: {asked.draft.max_draft} is taken as {MAX_DRAFT}, the most that a step has room for")
    if asked.prediction.nbytes > taken.prediction.nbytes:
        kept = taken.prediction.nbytes // 4
        found.append(f"prediction: longer than the context, so only its first {kept} tokens are used")
    return tuple(found)


def over_context(info: EngineInfo, asked: str, param: str) -> ContextLengthError:
    """The context does not hold what was `asked`; agents match on these words."""
    return ContextLengthError(
        f"This model's maximum context length is {info.context} tokens. However, {asked}.", param=param
    )


def context_error(prompt: int, completion: int, info: EngineInfo) -> ContextLengthError:
    """`prompt` and `completion` tokens do not fit together."""
    asked = f"you requested {prompt + completion} tokens ({prompt} in the prompt, {completion} in the completion)"
    return over_context(info, asked, "prompt" if prompt >= info.context else "max_tokens")


def _bounded(submit: Submit, info: EngineInfo) -> Submit:
    if submit.adapter:
        raise BadRequestError("adapter: this build has none, leave it out", param="adapter")
    tokens, given, limits = submit.prompt.nbytes // 4, submit.emitted.nbytes // 4, submit.limits
    needed = max(1 if limits.max_tokens < 0 else limits.max_tokens, given)
    if tokens + needed > info.context:
        raise context_error(tokens, needed, info)
    if not tokens:
        raise BadRequestError("the prompt is empty: give at least one token", param="prompt")
    _check_ids(_extremes(submit.emitted), info, "emitted")
    _check_ids(submit.sampling.logit_bias, info, "logit_bias")
    most = info.context - tokens if limits.max_tokens < 0 else limits.max_tokens
    drawable = tuple(token for token in limits.stop_ids if token < info.vocab_size)
    return replace(
        submit,
        limits=replace(limits, max_tokens=most, stop_ids=drawable),
        draft=_draft(submit.draft, info),
        prediction=submit.prediction[: 4 * info.context],
    )


def _draft(draft: Draft, info: EngineInfo) -> Draft:
    known = ("auto", "off", *info.drafters)
    if draft.drafter not in known:
        raise BadRequestError(
            f"no drafter {draft.drafter!r} is loaded here: use one of {', '.join(known)}", param="fwd.drafter"
        )
    return replace(draft, max_draft=min(draft.max_draft, MAX_DRAFT))


def _check_scores(submits: Sequence[Submit]) -> None:
    scores = sum(each.prompt.nbytes // 4 * (each.prompt_logprobs + 1) for each in submits)
    if scores > MAX_SCORES:
        raise BadRequestError(
            f"{scores} log-probabilities of prompt tokens, at most {MAX_SCORES}: ask for fewer or shorten the prompt",
            param="logprobs",
        )


def _extremes(packed: memoryview) -> Sequence[int]:
    """The least and the greatest id; a prompt of a million takes a millisecond."""
    ids = unpack_ids(packed)
    if len(ids) <= INLINE:
        return ids
    import numpy as np  # noqa: PLC0415  # slow to import: `Prompts.load` has done it off the event loop

    array = np.frombuffer(packed, np.int32)
    return [int(array.min()), int(array.max())]


def _check_ids(ids: Iterable[int], info: EngineInfo, param: str) -> None:
    if not all(0 <= token < info.vocab_size for token in ids):
        raise BadRequestError(f"an id in {param!r} is outside the vocabulary 0…{info.vocab_size - 1}", param=param)
