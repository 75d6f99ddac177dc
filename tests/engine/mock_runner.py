"""A model that is a hash: it checks that every cell it reads holds the token and position that belong there."""

import hashlib

from fwd.engine.request import Drawn
from fwd.engine.scheduler import MAX_ROWS
from fwd.protocol.messages import TopLogprobs

VOCAB = 97


def next_token(ids, seed, choice=0):
    digest = hashlib.blake2b(repr((list(ids), seed, choice)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def oracle(prompt, seed, tokens, stop_ids=(), choice=0):
    """The output of a request that nothing disturbs."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(next_token(ids, seed, choice))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


class MockRunner:
    """`fail(request)` makes the rows of a request non-finite; `before` is called before each launch."""

    def __init__(self, page_size, chunk, fail=lambda _: False, before=lambda: None):
        self.page_size, self.chunk = page_size, chunk
        self.cells = {}
        self.fail, self.before = fail, before
        self.launches = []

    def prefill(self, chunk):
        self.before()
        request, start = chunk.request, chunk.number * self.chunk
        assert request.computed == start, "prefill goes chunk by chunk from where the KV ends"
        end = min(start + self.chunk, request.prompt)
        self._write(request, start, end)
        self.launches.append(("prefill", request.id, end - start))
        scores = []
        if request.submit.prompt_logprobs >= 0:
            targets = request.ids[start + 1 : min(end + 1, request.prompt)]
            scores = [self._drawn(request, token) for token in targets]
        draws = end == request.prompt and not request.output and request.length < request.limit
        return (self._draw(request, end) if draws else None), scores

    def decode(self, spans):
        self.before()
        rows = sum(span.end - span.start for span in spans)
        assert 0 < rows <= MAX_ROWS
        assert len({span.request.id for span in spans}) == len(spans)
        self.launches.append(("decode", tuple(span.request.id for span in spans), rows))
        for span in spans:
            assert span.start == span.request.computed >= span.request.prompt
            self._write(span.request, span.start, span.end)
        return [self._draw(span.request, span.end) for span in spans if span.draws]

    def _cell(self, request, position):
        return request.pages[position // self.page_size] * self.page_size + position % self.page_size

    def _write(self, request, start, end):
        for position in range(start, end):
            self.cells[self._cell(request, position)] = (request.id, position, request.ids[position])

    def _draw(self, request, length):
        assert length == request.length
        for position in range(length):
            assert self.cells[self._cell(request, position)] == (request.id, position, request.ids[position])
        return self._drawn(request, next_token(request.ids, request.submit.seed, request.submit.choice))

    def _drawn(self, request, token):
        return Drawn(token, -float(token), TopLogprobs(), not self.fail(request))
