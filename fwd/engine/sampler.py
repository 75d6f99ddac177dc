"""Between requests and the sampling ops: what each row is to draw, and what came of it."""

from fwd.engine.request import Drawn, Request
from fwd.kernels.noise import choice_seed
from fwd.kernels.ops import Draw, Sampled, Top
from fwd.protocol.messages import TopLogprobs

NO_TOP = TopLogprobs()


def draw(request: Request) -> Draw:
    """How the next token of a request is drawn."""
    submit = request.submit
    sampling = submit.sampling
    assert submit.seed is not None
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
    seen, counts = request.history.read(request.ids, request.prompt) if penalties else ((), {})
    return Draw(
        seed=choice_seed(submit.seed, submit.choice),
        position=request.length,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bias=sampling.logit_bias,
        banned=submit.limits.stop_ids if request.output < submit.limits.min_tokens else (),
        seen=seen,
        counts=counts,
        top_logprobs=sampling.logprobs,
    )


def drawn(sampled: Sampled) -> list[Drawn]:
    """The rows of `sampled` as Python values."""
    rows = zip(
        sampled.ids.tolist(), sampled.logprobs.tolist(), map(_top, sampled.tops), sampled.finite.tolist(), strict=True
    )
    return [Drawn(*row) for row in rows]


def _top(top: Top | None) -> TopLogprobs:
    return NO_TOP if top is None else TopLogprobs(ids=tuple(top.ids), logprobs=tuple(top.logprobs))
