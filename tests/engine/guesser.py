"""A speculator that guesses on purpose: right or wrong as it is told, whatever has become of its guesses."""

from mock_runner import VOCAB, next_token

from fwd.engine.speculate.drafter import NOTHING, Proposal
from fwd.kernels.sizes import MAX_ROWS

NATURES = ("oracle", "liar", "fool", "edges")


class Guesser:
    """Up to `most` drafts a step. oracle: always right; liar: never; fool: mostly; edges: wrong where a page begins."""

    def __init__(self, rng, nature, most=MAX_ROWS, page=4):
        self.rng, self.nature, self.most, self.page = rng, nature, most, page
        self.settled, self.ended = [], []

    def drafts(self, request):
        return request.room > 0

    def propose(self, wishes, rows):
        spare, proposals = MAX_ROWS - rows, []
        for request, most in wishes:
            assert 0 < most <= min(spare + sum(len(each.ids) for each in proposals), request.room)
            ids = self._guess(request, self.rng.randrange(min(spare, most, self.most) + 1))
            spare -= len(ids)
            proposals.append(Proposal(self.nature, ids) if ids else NOTHING)
        return proposals

    def _guess(self, request, count):
        ids = list(request.ids)
        for _ in range(count):
            right = next_token(ids, request.submit.seed, request.submit.choice)
            ids.append(right if self._right(len(ids)) else (right + 1) % VOCAB)
        return tuple(ids[request.length :])

    def _right(self, position):
        match self.nature:
            case "oracle":
                return True
            case "liar":
                return False
            case "fool":
                return self.rng.random() < 0.8
        return position % self.page != 0

    def settle(self, request, proposal, count):
        assert count >= 1
        assert tuple(request.ids[request.length - count : request.length - 1]) == proposal.ids[: count - 1]
        self.settled.append((request.id, proposal, count))

    def measured(self, rows, drafts, seconds):
        assert 0 <= drafts < rows <= MAX_ROWS
        assert seconds >= 0

    def paused(self):
        pass

    def end(self, request):
        self.ended.append(request.id)

    def counts(self):
        return []

    corpus_tokens = 0

    def drop(self):
        return 0


class Knowing(Guesser):
    """Guesses from the answers that are known to come, by request."""

    def __init__(self, rng, nature, answers, most=MAX_ROWS, page=16, vocab=256):
        super().__init__(rng, nature, most, page)
        self.answers, self.vocab = answers, vocab

    def _guess(self, request, count):
        coming = self.answers[request.id][request.output :][:count]
        wrong = [not self._right(position) for position in range(request.length, request.length + len(coming))]
        return tuple((token + off) % self.vocab for token, off in zip(coming, wrong, strict=True))
