"""What the engine says of itself and of a request that ends."""

import time
from collections.abc import Sequence

from fwd.engine.request import Drawn, Request
from fwd.engine.scheduler import Scheduler
from fwd.engine.space import Space
from fwd.engine.speculate.drafter import Speculator
from fwd.errors import FwdError
from fwd.protocol.messages import Dropped, Failed, Pong, PromptLogprobs, Tokens
from fwd.protocol.values import Prefilling, Timing


def pong(scheduler: Scheduler, space: Space, speculator: Speculator) -> Pong:
    """The answer to a ping, without what the loop itself counts."""
    pool = space.main
    return Pong(
        seq=0,
        running=scheduler.running,
        waiting=scheduler.waiting,
        pages_free=pool.free,
        pages_total=pool.total,
        pages_cached=pool.cached,
        prefilling=[
            Prefilling(id=each.id, done=(each.leader or each).computed, total=each.prompt)
            for each in scheduler.prefilling
        ],
        drafters=speculator.counts(),
        corpus_tokens=speculator.corpus_tokens,
    )


def dropped(speculator: Speculator) -> Dropped:
    """Earlier answers are forgotten, or why those on disk are not."""
    try:
        return Dropped(tokens=speculator.drop())
    except FwdError as error:
        return Dropped(error=error.message)


def tokens(request: Request, drawn: Sequence[Drawn]) -> Tokens:
    """What a request is about to gain."""
    wanted = request.submit.sampling.logprobs >= 0
    return Tokens(
        id=request.id,
        start=request.output,
        ids=[token.id for token in drawn],
        logprobs=[token.logprob for token in drawn] if wanted else [],
        top=[token.top for token in drawn] if wanted else [],
    )


def scored(request: Request, start: int, scores: Sequence[Drawn]) -> PromptLogprobs:
    """Scores of the prompt tokens from `start` on."""
    logprobs, top = [score.logprob for score in scores], [score.top for score in scores]
    return PromptLogprobs(id=request.id, start=start, logprobs=logprobs, top=top)


def failed(request: Request, error: FwdError) -> Failed:
    """The end of a request that did not end well."""
    return Failed(id=request.id, code=error.code, message=error.message, param=error.param)


def timing(request: Request) -> Timing:
    """Where the time of a request went that ends now."""
    clock, now = request.clock, time.monotonic()
    started = clock.started or now
    prefilled = clock.prefilled or now
    return Timing(
        queue_ms=(started - clock.arrived) * 1e3,
        prefill_ms=(prefilled - started) * 1e3,
        decode_ms=(now - prefilled) * 1e3,
        steps=clock.steps,
        cached_tokens=max(0, request.cached),
        cache_miss=request.miss,
        drafted=dict(request.drafted),
        accepted=dict(request.accepted),
        holds=[request.holds[held] for held in range(max(request.holds, default=-1) + 1)],
        differs_at=request.differs_at,
    )
