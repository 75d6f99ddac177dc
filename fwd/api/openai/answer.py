"""The streams behind one response: opened together, read as generations, cancelled together."""

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from aiohttp import web
from msgspec.structs import replace

from fwd.api.context import REQUEST_ID, RUNNING, SERVICE
from fwd.api.openai.parameters import Parameters
from fwd.front.bounds import context_error
from fwd.front.generation import Generation
from fwd.front.service import Service
from fwd.front.streams import Stream
from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import EMPTY

SEED_BITS = 53  # what JavaScript can send back


class Wanted(NamedTuple):
    """What to open: `n` choices of each prompt, in packed ids. Log-probabilities −1 are off.

    `max_tokens` None is all the context; `continues` says that the answer goes on in the prompt's own text; `deadline`
    is a time of the event loop; `prediction` holds ids that are likely in each choice; `grammar` is what each must be.
    """

    parameters: Parameters
    prompts: Sequence[memoryview]
    max_tokens: int | None
    logprobs: int = -1
    prompt_logprobs: int = -1
    continues: bool = False
    deadline: float | None = None
    prediction: memoryview = EMPTY
    grammar: str = ""


class Answer:
    """One response. Choice i of prompt p is generation p·n + i; all share one seed, as if each prompt were alone."""

    def __init__(self, service: Service, wanted: Wanted, number: str) -> None:
        self.service = service
        self.info = service.info()
        self.wanted = wanted
        self.id = number
        self.created = int(time.time())
        self.n = wanted.parameters.choices
        seed = wanted.parameters.seed
        self.seed = secrets.randbits(SEED_BITS) if seed is None else seed
        self.generations: list[Generation] = []

    @property
    def streams(self) -> list[Stream]:
        """The stream of each generation."""
        return [generation.stream for generation in self.generations]

    def prompt(self, index: int) -> Sequence[int]:
        """The prompt of a generation, in ids."""
        return unpack_ids(self.wanted.prompts[index // self.n])

    def open(self) -> None:
        """Admit all choices or none; raises what `Service.open_all` raises."""
        parameters, prompts = self.wanted.parameters, self.service.prompts
        submit = Submit(
            sampling=parameters.sampling(self.wanted.logprobs),
            limits=replace(parameters.limits(prompts, self.wanted.max_tokens), deadline_ms=self._milliseconds_left()),
            seed=self.seed,
            priority=parameters.extension.priority,
            cache_key=parameters.prompt_cache_key or "",
            prompt_logprobs=self.wanted.prompt_logprobs,
            draft=parameters.draft,
            cache=parameters.cache_prompt is not False,
            prediction=self.wanted.prediction,
            grammar=self.wanted.grammar,
        )
        choices = [(ids, choice) for ids in self.wanted.prompts for choice in range(self.n)]
        submits = [replace(submit, prompt=ids, choice=choice) for ids, choice in choices]
        self.generations += map(self._generation, self.service.open_all(submits))

    def close(self) -> None:
        """Cancel what is still open."""
        for stream in self.streams:
            self.service.cancel(stream)

    def _milliseconds_left(self) -> float:
        if self.wanted.deadline is None:
            return 0.0
        return max(1.0, 1e3 * (self.wanted.deadline - asyncio.get_running_loop().time()))

    def _generation(self, stream: Stream) -> Generation:
        parameters = self.wanted.parameters
        return Generation(
            stream,
            self.service.prompts.tokenizer,
            parameters.stops,
            include_stop=bool(parameters.include_stop_str_in_output),
            continues=self.wanted.continues,
        )


async def read_prediction(service: Service, parameters: Parameters) -> memoryview:
    """Ids of what the client says is likely in the answer; the text itself is let go."""
    given, parameters.prediction = parameters.prediction, None
    return await service.prompts.prediction(given.text, service.info().context) if given else EMPTY


def check_fit(service: Service, tokens: int, most: int | None) -> None:
    """Raise `ContextLengthError` if a prompt of so many tokens and `most` new ones do not fit, whatever they are."""
    info, needed = service.info(), 1 if most is None else most
    if tokens + needed > info.context:
        raise context_error(tokens, needed, info)


@contextmanager
def answering(request: web.Request, wanted: Wanted, prefix: str) -> Iterator[Answer]:
    """Open an answer; whatever happens to the handler, nothing of it runs on afterwards."""
    answer = Answer(request.app[SERVICE], wanted, f"{prefix}-{request[REQUEST_ID]}")
    answer.open()
    try:
        with request.app[RUNNING].entry(answer.id, answer.streams):
            yield answer
    finally:
        answer.close()
