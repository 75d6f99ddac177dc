"""What the engine says of itself and of a request that ends."""

import time

from fwd.engine.request import Request
from fwd.engine.scheduler import Scheduler
from fwd.engine.space import Space
from fwd.engine.speculate.drafter import Speculator
from fwd.protocol.messages import Pong
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
        differs_at=request.differs_at,
    )
