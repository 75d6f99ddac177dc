"""A model that is a hash: it checks that every cell and record it reads holds what belongs there, however it came.

What a cell holds is its position, the tokens up to it, and whether a prefill or a decode row made it: prompt positions
must be prefill-made and output positions decode-made, whoever computed them.

With `ahead` it is as late as a device may be: a step runs when it is collected, or when something launched after it
must, with the pages and records that it was given and the ids that the step before it has drawn.
"""

import hashlib
from array import array
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np

from fwd.engine.request import Drawn, Prefilled
from fwd.engine.speculate.verify import verified
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.layout import Group
from fwd.protocol.values import TopLogprobs

VOCAB = 97
FULL = Group("full", 0, ())
STATE = Group("state", 0, ())


def sliding(window):
    return Group("sliding", window, ())


def next_token(ids, seed, choice=0, mask=None):
    """One of all ids, or of those in a mask; 0 if there are none."""
    digest = hashlib.blake2b(repr((list(ids), seed, choice)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    if mask is None:
        return number % VOCAB
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little", count=VOCAB)).tolist() or [0]
    return allowed[number % len(allowed)]


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

    def __init__(self, page_size, chunk, groups=(FULL,), fail=lambda _: False, before=lambda: None, ahead=False):
        self.page_size, self.chunk = page_size, chunk
        self.paged = [group for group in groups if group.kind != "state"]
        self.states = any(group.kind == "state" for group in groups)
        self.cells = [defaultdict(lambda: None) for _ in self.paged]
        self.records = {}
        self.fail, self.before = fail, before
        self.launches = []
        self.copied = 0
        self.ahead = self.deferred = ahead
        self.steps, self.done = deque(), deque()
        self.drawn = {}  # by the latest step, and by request: the ids it drew
        self.most = 0  # steps that were launched and not collected

    def copy(self, copies):
        self._catch_up()
        for group, source, target in copies:
            self.copied += 1
            cells, size = self.cells[group], self.page_size
            for offset in range(size):
                cells[target * size + offset] = cells[source * size + offset]

    def prefill(self, chunk):
        self.before()
        self._catch_up()
        request = chunk.request
        assert chunk.start == request.computed, "prefill goes on from where the KV ends"
        assert chunk.start // self.chunk == chunk.number == (chunk.end - 1) // self.chunk, "a chunk of the grid"
        assert chunk.end == min((chunk.number + 1) * self.chunk, request.prompt)
        assert all(follower.prefill_key == request.prefill_key for follower in chunk.followers)
        self._write(request, chunk.start, chunk.end)
        self._check(request, chunk.start, chunk.end)
        if self.states:
            self._check_record(request, request.record, chunk.start)
            self.records[request.staged[0]] = _content(request, chunk.end - 1)
        self.launches.append(("prefill", request.id, chunk.end - chunk.start))
        scores = []
        if request.submit.prompt_logprobs >= 0:
            targets = request.ids[chunk.start + 1 : min(chunk.end + 1, request.prompt)]
            scores = [self._drawn(request, token) for token in targets]
        drawn = [self._draw(each, mask=each.grammar and each.grammar.masks[0]) for each in chunk.drawing]
        return Prefilled(drawn, scores, finite=True)

    def launch(self, spans):
        self.before()
        rows = sum(span.reach - span.start for span in spans)
        assert 0 < rows <= MAX_ROWS
        assert len({span.request.id for span in spans}) == len(spans)
        self.launches.append(("decode", tuple(span.request.id for span in spans), rows))
        self.steps.append([self._given(span) for span in spans])
        self.most = max(self.most, len(self.steps) + len(self.done))
        if not self.ahead:
            self._catch_up()

    def collect(self):
        if not self.done:
            self._run()
        return self.done.popleft()

    def _given(self, span):
        """What the device is given of a span: nothing that happens afterwards is seen."""
        request, start, end, _ = span
        assert request.prompt <= span.start
        assert start == (request.length if end > request.length else request.computed)
        assert self.ahead or end <= request.length
        assert not span.drafts or end == request.length
        assert span.reach < request.limit
        assert not (request.grammar and end > request.length), "it is not run ahead"
        masks = request.grammar.masks if request.grammar and span.draws else [None] * (1 + len(span.drafts))
        assert len(masks) == 1 + len(span.drafts), "a mask for each row that draws"
        reads = [request.record, *request.staged[:-1]]
        first = len(request.staged) - (span.reach - start)  # where it runs ahead, the one before it stages a record too
        return SimpleNamespace(
            span=span,
            draws=span.draws,
            request=SimpleNamespace(
                id=request.id,
                ids=request.ids[:],
                prompt=request.prompt,
                submit=request.submit,
                tables=[SimpleNamespace(pages=table.pages[:]) for table in request.tables],
            ),
            masks=[mask if mask is None else mask.copy() for mask in masks],
            reads=reads[first:],
            writes=request.staged[first:],
        )

    def _catch_up(self):
        while self.steps:
            self._run()

    def _run(self):
        """Run the oldest step that has not run."""
        step, drawn = self.steps.popleft(), {}
        for given in step:
            request, span = given.request, given.span
            if span.end > len(request.ids):
                request.ids += array("i", [self.drawn[request.id]])
            assert span.end <= len(request.ids), "the id of the last row is known"
            request.ids += array("i", span.drafts)
            self._write(request, span.start, span.reach)
        for given in step:
            self._check(given.request, given.span.start, given.span.reach)
            if self.states:
                self._chain(given)
        results = [self._verified(given) for given in step if given.draws]
        for given, result in zip([given for given in step if given.draws], results, strict=True):
            drawn[given.request.id] = result[-1].id
        self.drawn = drawn
        self.done.append(results)

    def _chain(self, given):
        request, span = given.request, given.span
        assert len(given.writes) == span.reach - span.start
        for position, read, write in zip(range(span.start, span.reach), given.reads, given.writes, strict=True):
            self._check_record(request, read, position)
            self.records[write] = _content(request, position)

    def _check_record(self, request, record, position):
        """The record is the state before `position`."""
        found = self.records[record] if record >= 0 else None
        assert found == (_content(request, position - 1) if position else None)

    def _cell(self, request, group, position):
        return request.tables[group].pages[position // self.page_size] * self.page_size + position % self.page_size

    def _write(self, request, start, end):
        for group in range(len(self.paged)):
            for position in range(start, end):
                cell = self._cell(request, group, position)
                assert cell >= 0
                self.cells[group][cell] = _content(request, position)

    def _check(self, request, start, end):
        """Every cell that rows `start` … `end` − 1 see."""
        for index, group in enumerate(self.paged):
            first = max(0, start - group.window + 1) if group.window else 0
            for position in range(first, end):
                cell = self._cell(request, index, position)
                assert self.cells[index][cell] == _content(request, position), (request.id, position, group)

    def _verified(self, given):
        request, span = given.request, given.span
        ends = range(span.end, span.reach + 1)
        return verified(span.drafts, [self._draw(request, *row) for row in zip(ends, given.masks, strict=True)])

    def _draw(self, request, end=None, mask=None):
        return self._drawn(request, next_token(request.ids[:end], request.submit.seed, request.submit.choice, mask))

    def _drawn(self, request, token):
        return Drawn(token, -float(token), TopLogprobs(), not self.fail(request))


def _content(request, position):
    return position, hash(request.ids[: position + 1].tobytes()), min(position + 1, request.prompt)
