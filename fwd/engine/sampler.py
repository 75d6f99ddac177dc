"""Between requests and the sampling ops: what each row is to draw, and what came of it."""

from collections import Counter
from collections.abc import Sequence

from fwd.engine.request import Drawn, Request
from fwd.kernels.noise import choice_seed
from fwd.kernels.ops import Draw, Mask, Sampled, Top
from fwd.protocol.values import TopLogprobs

NO_TOP = TopLogprobs()


def draw(
    request: Request, length: int, drafts: Sequence[int] = (), *, history: bool = True, mask: Mask | None = None
) -> Draw:
    """How a request draws the token that comes after `length` ones and `drafts`, which count as output.

    Without `history` the ids they are stay out. `mask` is what its grammar lets through there.
    """
    submit = request.submit
    sampling = submit.sampling
    wanted = history and penalized(request)
    seen, counts = request.history.read(request.ids, request.prompt) if wanted else ((), {})
    if wanted and drafts:
        seen, counts = {*seen, *drafts}, Counter(counts) + Counter(drafts)
    return Draw(
        seed=seed(request),
        position=length + len(drafts),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bias=sampling.logit_bias,
        banned=banned(request, length + len(drafts)),
        mask=mask,
        seen=seen,
        counts=counts,
        top_logprobs=sampling.logprobs,
    )


def seed(request: Request) -> int:
    """The 64 bits that the noise of a request depends on."""
    assert request.submit.seed is not None
    return choice_seed(request.submit.seed, request.submit.choice)


def penalized(request: Request) -> bool:
    """What a request draws depends on what it has drawn."""
    sampling = request.submit.sampling
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


def banned(request: Request, length: int) -> Sequence[int]:
    """The ids that are never drawn after `length` tokens."""
    limits = request.submit.limits
    return limits.stop_ids if length - request.prompt < limits.min_tokens else ()


def mask_of(request: Request, place: int) -> Mask | None:
    """The ids that the grammar of a request lets it draw at `place` in its next step; None: it has none."""
    return request.grammar.masks[place - request.length] if request.grammar else None


def drawn(sampled: Sampled) -> list[Drawn]:
    """The rows of `sampled` as Python values."""
    rows = zip(
        sampled.ids.tolist(), sampled.logprobs.tolist(), map(_top, sampled.tops), sampled.finite.tolist(), strict=True
    )
    return [Drawn(*row) for row in rows]


def _top(top: Top | None) -> TopLogprobs:
    return NO_TOP if top is None else TopLogprobs(ids=tuple(top.ids), logprobs=tuple(top.logprobs))
