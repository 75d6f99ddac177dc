"""What a local client's messages become, and what its streams are told as."""

from msgspec.structs import replace

from fwd.front.streams import Stream
from fwd.protocol.local import Accepted, Prompt
from fwd.protocol.messages import PromptLogprobs, Submit, Tokens

BATCH = 512


def submit_of(prompt: Prompt, ids: memoryview, likely: memoryview, stop_ids: tuple[int, ...]) -> Submit:
    """A request in text as one in ids: those of its body and of its prediction."""
    return Submit(
        id=prompt.id,
        prompt=ids,
        sampling=prompt.sampling,
        limits=replace(prompt.limits, stop_ids=stop_ids),
        seed=prompt.seed,
        priority=prompt.priority,
        cache_key=prompt.cache_key,
        draft=prompt.draft,
        cache=prompt.cache,
        prediction=likely,
    )


def accepted(tag: int, stream: Stream) -> Accepted:
    """The answer to the client's request `tag`."""
    return Accepted(
        tag=tag, id=stream.id, seed=stream.seed, prompt_tokens=len(stream.prompt), notes=tuple(stream.notes)
    )


def tokens(stream: Stream, cursor: int) -> Tokens:
    """The next output tokens from `cursor` on, up to `BATCH`."""
    begin, end = cursor - stream.given, cursor - stream.given + BATCH
    return Tokens(
        id=stream.id,
        start=cursor,
        ids=stream.emitted[cursor : cursor + BATCH].tolist(),
        logprobs=stream.logprobs[begin:end].tolist(),
        top=stream.top[begin:end],
    )


def scores(stream: Stream, scored: int) -> PromptLogprobs:
    """The next scores of prompt tokens after the first `scored`, up to `BATCH`."""
    return PromptLogprobs(
        id=stream.id,
        start=scored + 1,
        logprobs=stream.prompt_logprobs[scored : scored + BATCH].tolist(),
        top=stream.prompt_top[scored : scored + BATCH],
    )
