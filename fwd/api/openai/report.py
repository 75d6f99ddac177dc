"""What an answer says about itself: usage, the `fwd` block with timings and receipt, the fingerprint."""

from collections import Counter
from hashlib import sha256
from typing import Any

from fwd.api.openai.answer import Answer
from fwd.protocol.values import Timing

PREDICTION = "suffix:prediction"  # what its drafts are counted as


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts so far: a prompt counts once however many choices it has."""
    prompt = sum(ids.nbytes // 4 for ids in answer.wanted.prompts)
    completion = sum(generation.tokens for generation in answer.generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens(answer)},
        "completion_tokens_details": _predicted(answer, completion),
    }


def cached_tokens(answer: Answer) -> int:
    """Prompt tokens that were in the cache when the request came: what its first choices found there."""
    return sum(timing.cached_tokens for timing in timings(answer)[:: answer.n])


def _predicted(answer: Answer, completion: int) -> dict[str, int]:
    """Of the ids drafted from `prediction` those that held and those that did not.

    Those beyond a stop string, which the engine knows nothing of, do not count as held.
    """
    spent = timings(answer)
    drafted, held = (
        sum(counts.get(PREDICTION, 0) for counts in made)
        for made in ([timing.drafted for timing in spent], [timing.accepted for timing in spent])
    )
    return {"accepted_prediction_tokens": min(held, completion), "rejected_prediction_tokens": drafted - held}


def timings(answer: Answer) -> list[Timing]:
    """The engine's account of each choice; empty where the engine died before it gave it."""
    return [stream.finished.timing if stream.finished else Timing() for stream in answer.streams]


def report(answer: Answer) -> dict[str, Any]:
    """The response extension `fwd` of a finished answer. Engine times are sums over the choices, in milliseconds."""
    spent = timings(answer)
    missed = next((timing for timing in spent if timing.cache_miss), Timing())
    joules = [timing.joules for timing in spent if timing.joules is not None]
    return {
        "timings": _times(answer, spent),
        "tokens_per_second": _rate(answer),
        "drafted": dict(sum((Counter(timing.drafted) for timing in spent), Counter())),
        "accepted": dict(sum((Counter(timing.accepted) for timing in spent), Counter())),
        "max_draft": _max_draft(answer),
        "accept_length": _accept_length(spent),
        "speculative_decoding": _speculative(spent[0]) if len(spent) == 1 else None,
        "cached_tokens": cached_tokens(answer),
        "cache_miss": missed.cache_miss or None,
        "cache_differs_at": missed.differs_at if missed.differs_at >= 0 else None,
        "energy_joules": sum(joules) if joules else None,
        "resumes": sum(stream.resumes for stream in answer.streams),
        "notes": list(dict.fromkeys(note for stream in answer.streams for note in stream.notes)),
        "receipt": {**constants(answer), "seed": answer.seed},
    }


def constants(answer: Answer) -> dict[str, Any]:
    """The part of a receipt that is the same for all answers: what the tokens depend on besides the request."""
    info, prompts = answer.info, answer.service.prompts
    return {
        "build": info.build,
        "weights_hash": info.weights_hash,
        "template_hash": prompts.template.hash,
        "tokenizer_hash": prompts.tokenizer.hash,
        "kernel_set": info.kernel_set,
        "dtype": info.dtype,
        "requant": list(info.requant),
        "kv_dtype": info.kv_dtype,
        "device": info.device,
        "chunk_size": info.chunk,
        "threads": info.threads,
    }


def fingerprint(answer: Answer) -> str:
    """OpenAI's `system_fingerprint`: a short hash of the receipt's constants."""
    return "fp_" + sha256(repr(constants(answer)).encode()).hexdigest()[:12]


def _times(answer: Answer, spent: list[Timing]) -> dict[str, float | None]:
    streams = answer.streams
    begin = min(stream.created for stream in streams)
    first = min((stream.first_token for stream in streams if stream.first_token), default=None)
    end = max(stream.ended or begin for stream in streams)
    return {
        "queue_ms": _ms(sum(timing.queue_ms for timing in spent) / 1000),
        "prefill_ms": _ms(sum(timing.prefill_ms for timing in spent) / 1000),
        "decode_ms": _ms(sum(timing.decode_ms for timing in spent) / 1000),
        "ttft_ms": None if first is None else _ms(first - begin),
        "total_ms": _ms(end - begin),
    }


def _rate(answer: Answer) -> float | None:
    """Tokens per second after the first one, over all choices together."""
    streams = [stream for stream in answer.streams if stream.first_token and stream.ended]
    after = sum(len(stream.emitted) - 1 for stream in streams)
    if not after:
        return None
    spent = max(stream.ended or 0 for stream in streams) - min(stream.first_token or 0 for stream in streams)
    return round(after / max(spent, 1e-6), 2)


def _accept_length(spent: list[Timing]) -> float | None:
    """Tokens that a decode step brought: 1, and the drafts that held."""
    steps = sum(timing.steps for timing in spent)
    return round(1 + sum(sum(timing.accepted.values()) for timing in spent) / steps, 3) if steps else None


def _max_draft(answer: Answer) -> int | None:
    """The most drafts that a step had, as it was asked for and taken."""
    taken = max(stream.submit.draft.max_draft for stream in answer.streams)
    return taken if taken >= 0 else None


def _speculative(timing: Timing) -> dict[str, Any] | None:
    """VLLM's record of one answer, in its names; steps without drafts are not in it."""
    steps, drafted, accepted = sum(timing.holds), sum(timing.drafted.values()), sum(timing.accepted.values())
    if not (steps and drafted):
        return None
    return {
        "mean_acceptance_length": round(1 + accepted / steps, 3),
        "draft_acceptance_rate": round(accepted / drafted, 3),
        "acceptance_histogram": timing.holds,
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
