"""What a draft model must propose, computed from nothing but committed ids and the target's features of a clean run."""

from collections import defaultdict

import torch
from torch.nn.functional import pad

from fwd.engine.runner import Follower
from fwd.engine.sampler import draw
from fwd.kernels.rows import Cells, Rows
from fwd.models.layout import groups

STEP = 16


class Recorder(Follower):
    """A follower that remembers the features of each request, by its prompt, its choice and the position."""

    def __init__(self, chunk):
        self.chunk, self.found = chunk, defaultdict(dict)

    def prefilled(self, chunk, rows, features):
        first = chunk.number * self.chunk
        for request in (chunk.request, *chunk.followers):
            for position in range(chunk.start, chunk.end):
                self.found[request.id][position] = features[position - first].clone()

    def collected(self, spans, committed, features):
        row, drawn = 0, iter(committed)
        for span in spans:
            tokens = next(drawn) if span.draws else ()
            for place in range(span.end - span.start + max(0, len(tokens) - 1)):
                self.found[span.request.id][span.start + place] = features[row + place].clone()
            row += span.reach - span.start


class Naive:
    """Drafts by a cache of its own, filled anew each time: the prompt by chunks, known ids after it, then id by id."""

    def __init__(self, draft, features, *, chunk, page, context, kv):
        self.draft, self.features, self.chunk, self.page, self.kv = draft, features, chunk, page, kv
        self.spec, self.pages = draft.spec, -(-context // page)
        self.groups = len(groups(draft.spec.cache))

    @torch.inference_mode()
    def propose(self, request, count):
        """`count` ids after those that are known of a request."""
        shift, known = self.spec.shift, request.ids.tolist()
        self.cache = self.draft.new_cache(self.pages, self.page, self.kv)
        self._chunks(request, known)
        dflash = self.spec.kind == "dflash"
        end = request.length - shift
        for position in range(request.prompt - (shift and not dflash), end, STEP):
            hidden = self._step(request, known, position, min(position + STEP, end))
        if dflash:
            return self._block(request, known, count)
        drafts = [self._drawn(request, hidden, [])]
        while len(drafts) < count:
            hidden = self._forward([drafts[-1]], self._padded(hidden), end + len(drafts) - 1)
            drafts.append(self._drawn(request, hidden, drafts))
        return drafts

    def _chunks(self, request, known):
        for begin in range(0, request.prompt, self.chunk):
            end = min(begin + self.chunk, request.prompt)
            ids = [known[min(place + self.spec.shift, request.length - 1)] for place in range(begin, end)]
            fused = None
            if self.spec.taps:
                own = [self.features[request.id][place] for place in range(begin, end)]
                fused = self.draft.fuse(pad(torch.stack(own), (0, 0, 0, self.chunk - len(own))))
            rows = self._rows(begin, end, self.chunk, begin // self.chunk)
            self.draft.absorb(torch.tensor(ids + [0] * (self.chunk - len(ids))), fused, rows, self.cache)

    def _step(self, request, known, begin, end):
        """Hidden of the last of some rows."""
        ids, fused = known[begin + self.spec.shift : end + self.spec.shift], None
        if self.spec.taps:
            own = [self.features[request.id][place] for place in range(begin, end)]
            fused = self.draft.fuse(self._padded(torch.stack(own)))
        return self._forward(ids, fused, begin)

    def _forward(self, ids, hidden, position):
        rows = self._rows(position, position + len(ids), len(ids) + -len(ids) % self.draft.ops.row_block)
        padded = torch.tensor(ids + [0] * (-len(ids) % self.draft.ops.row_block))
        if self.spec.kind == "dflash":
            return self.draft.absorb(padded, hidden, rows, self.cache)
        return self.draft.forward(padded, hidden, rows, self.cache)[len(ids) - 1 : len(ids)]

    def _padded(self, rows):
        return pad(rows, (0, 0, 0, -len(rows) % self.draft.ops.row_block))

    def _block(self, request, known, count):
        start, size = request.length - 1, -(-(count + 1) // self.draft.ops.row_block) * self.draft.ops.row_block
        ids = torch.tensor([known[-1], *[self.spec.mask] * count, *[0] * (size - count - 1)])
        ends = torch.tensor([start + count] * (count + 1) + [0] * (size - count - 1))
        hidden = self.draft.draft(ids, ends, self._rows(start, start + count + 1, size), self.cache)
        logits = self.draft.logits(hidden)
        draws = [draw(request, request.length + place) for place in range(count)]
        return self.draft.ops.sample(logits[1 : count + 1].contiguous(), draws).ids.tolist()

    def _drawn(self, request, hidden, drafts):
        logits = self.draft.logits(self._padded(hidden))[:1].contiguous()
        return self.draft.ops.sample(logits, [draw(request, request.length, drafts)]).ids.item()

    def _rows(self, begin, end, size, chunk=-1):
        positions = torch.arange(begin, begin + size)
        live = positions < end
        table = torch.arange(self.pages, dtype=torch.int32)[None]
        cells = Cells(torch.where(live, positions, -1), table)
        lines = torch.where(live, 0, -1)
        return Rows(positions, lines, torch.full_like(lines, -1), (cells,) * self.groups, chunk=chunk)
