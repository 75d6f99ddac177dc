"""Which tokens may come next in requests that have a grammar (`fwd.grammar.compiled` says what that is)."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fwd.engine.request import Request
from fwd.engine.watch import Watch
from fwd.errors import BadFrameError, FwdError, GrammarError, OverloadedError
from fwd.grammar.compiled import STEP_SECONDS, Tokens, check_vocabulary, reason
from fwd.kernels.sizes import MAX_ROWS, mask_words
from fwd.protocol.messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = NDArray[np.uint32]
FORCED_BYTES = 64  # of forced text that are cut into drafts
FORCED_SECONDS = 0.001  # of a CPU: where it takes longer to find there is no more of it
DRAFTS_SECONDS = STEP_SECONDS / 5  # of a CPU: a step that has taken as long looks at no further draft
REMAKE_SECONDS = 10 * STEP_SECONDS  # of a CPU, once in an answer
MOST_LEFT = 2  # steps that were given up and have not come back: with more of them nobody begins a grammar
TOO_SLOW = f"a step of the grammar takes more than {STEP_SECONDS * 1e3:.0f} ms: simplify it"


class Grammars:
    """Compiles the grammars of one model, whose logits have `vocab` ids, in a thread: nobody else waits for it.

    The library, which lets the GIL go meanwhile, is imported with the first one. Requests `enter`, and are found in
    `leave` when their grammar is compiled. It is for each of them, choices of one prompt too: copies of what the
    library compiles share a lexer, its limits and its lock, and requests must not feel each other.
    """

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._watch = Watch(STEP_SECONDS)
        self._tokens: Future[Tokens] | None = None
        self._entered: dict[int, tuple[Request, Future[Matcher]]] = {}

    @property
    def busy(self) -> bool:
        """Requests have entered and not left."""
        return bool(self._entered)

    def learn(self, vocabulary: Vocabulary) -> None:
        """Take the text of the tokens, some seconds for 100,000; raises `BadFrameError` if it is not whole."""
        check_vocabulary(vocabulary)
        self._tokens = self._thread.submit(Tokens, vocabulary, self._vocab)

    def enter(self, request: Request) -> None:
        """Begin to compile the grammar of a request; raises `BadFrameError` if the vocabulary is not known."""
        if self._tokens is None:
            raise BadFrameError("a request with a grammar came before the vocabulary")
        tokens, grammar = self._tokens, request.submit.grammar
        compiling = self._thread.submit(lambda: Matcher(tokens.result(), grammar, self._watch))
        self._entered[request.id] = request, compiling

    def forget(self, request: Request) -> bool:
        """Let a request go that may have entered and not left; whether it is one."""
        _, compiling = self._entered.pop(request.id, (request, None))
        if compiling:
            compiling.cancel()
        return compiling is not None

    def leave(self, seconds: float = 0.0) -> Iterator[tuple[Request, FwdError | None]]:
        """The requests that have a matcher now, or cannot have one; waits for the first compiler as long as said.

        The error is a `GrammarError` if the grammar cannot be compiled or what was emitted does not follow from it, an
        `OverloadedError` while steps that were given up go on.
        """
        if seconds and self._entered:
            wait([next(iter(self._entered.values()))[1]], seconds)
        for request, compiling in [each for each in self._entered.values() if each[1].done()]:
            del self._entered[request.id]
            try:
                request.grammar = self._begun(compiling.result(), request.ids[request.prompt :])
            except (GrammarError, OverloadedError) as error:
                yield request, error
            else:
                yield request, None

    def _begun(self, matcher: "Matcher", emitted: Sequence[int]) -> "Matcher":
        """The matcher after the ids that are known, with the mask of the next."""
        if self._watch.left >= MOST_LEFT:
            raise OverloadedError("steps of other grammars have not come back yet: try again")
        if all(map(matcher.take, emitted)):
            matcher.prepare()
        if matcher.error:
            raise GrammarError(matcher.error)
        return matcher


class Matcher:
    """Where one request stands in its grammar: after all the ids it has been given with `take`.

    `masks` are the ids that may come after these and after each draft of the latest `prepare`: [⌈vocab/32⌉] each, valid
    until the next `prepare`. `ended`: nothing may follow. `error`: it cannot go on, and why.
    Raises `GrammarError` if the grammar cannot be compiled.
    """

    def __init__(self, tokens: Tokens, grammar: str, watch: Watch) -> None:
        self._tokens = tokens
        self._grammar = grammar
        self._watch = watch
        self._state = tokens.compiled(grammar)
        self._ids: list[int] = []
        self._words = self._room()
        self.masks: list[Mask] = []
        self.ended = False
        self.error = ""
        self._forces = True  # text, and that is soon found
        self._looked = False  # at what may come: it uses up some of the limits
        self._alone = False  # that has spoiled the state once: from then on there are no drafts

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self._tokens.ends

    def take(self, token: int) -> bool:
        """Go on by a committed id; False, and `error` says why, if it may not stand there."""
        if self.error or self.ended or not self._advance(token):
            self.error = self.error or f"the grammar cannot go on with token {token}: {reason(self._state)}"
            return False
        self._ids.append(token)
        self.ended = self._state.is_stopped() or token in self.ends
        return True

    def prepare(self, drafts: Sequence[int] = ()) -> int:
        """Have `masks` for the next row and the rows of drafts: returns how many the grammar, and the time, let stand.

        Drafts only have what the first mask leaves of `DRAFTS_SECONDS`. Where they go beyond the limits, or one call
        takes all the time of a step that has drafts, there are none from then on and the state is made again as it
        would be without them. So they decide nothing, but in one case: the request fails where that takes more than
        `REMAKE_SECONDS`.
        """
        if self.error:
            return 0  # who was given up may still be at work on the state
        drafts = () if self._alone else drafts
        held = self._walked(drafts)
        if self._looked and (drafts if held is None else self._state.is_error()):
            held = self._walked(()) if self._remake() else None
        if held is None:
            self.error = TOO_SLOW
        elif self._state.is_error():
            self.error = f"the grammar cannot go on: {reason(self._state)}"
        return held or 0

    def forced(self, most: int) -> tuple[int, ...]:
        """Ids of the text that must come next, but the last, which may reach into what comes after it."""
        if self.ended or self.error or self._alone or not self._forces:
            return ()
        self._looked, state = True, self._state
        found = self._watch(lambda: _forced(state))
        if found is None or state.is_error():
            self.error = "" if self._remake() else TOO_SLOW
            return ()
        text, seconds = found
        self._forces = seconds < FORCED_SECONDS
        return self._tokens(text[:FORCED_BYTES])[:-1][:most]

    def _walked(self, drafts: Sequence[int]) -> int | None:
        """Fill in the masks along the drafts and come back; None: it took too long, and the state is of no use."""
        state, words = self._state, self._words
        self._looked = self._looked or bool(drafts)
        held = self._watch(lambda: _walk(state, words, drafts))
        if held is None:
            self._words = self._room()  # the thread that was given up still writes into the other
        else:
            self.masks = [self._words[row, : mask_words(len(self._tokens.tokens))] for row in range(held + 1)]
        return held

    def _room(self) -> Mask:
        """One word more for the id that a vocabulary without an end is given."""
        return np.zeros((MAX_ROWS, mask_words(self._tokens.table.vocab_size)), np.uint32)

    def _advance(self, token: int) -> bool:
        """Go on; it takes less than the mask did, which has gone this way."""
        if self._state.consume_token(token):
            return True
        return self._looked and self._remake() and bool(self._state.consume_token(token))

    def _remake(self) -> bool:
        """Make the state as it is if nothing was looked at; False if that takes too long.

        It takes as long as compiling and all steps of the answer, so it is done once.
        """
        self._alone, self._looked = True, False
        tokens, grammar, ids, words = self._tokens, self._grammar, tuple(self._ids), self._room()
        state = self._watch(lambda: _followed(tokens, grammar, ids, words), REMAKE_SECONDS)
        if state is None:
            return False
        self._state = state
        return True


def _followed(tokens: Tokens, grammar: str, ids: Sequence[int], words: Mask) -> "LLMatcher":
    """The state after some ids, with a lexer that nothing else was asked of."""
    state = tokens.compiled(grammar)
    for token in ids:
        _fill(state, words[0])
        state.consume_token(token)
    return state


def _walk(state: "LLMatcher", words: Mask, drafts: Sequence[int]) -> int:
    """Fill in the mask before the drafts and after each that stands while there is time; come back; how many stood."""
    begun, held = time.thread_time(), 0
    _fill(state, words[0])
    for draft in drafts:
        late = time.thread_time() - begun > DRAFTS_SECONDS
        if late or state.is_stopped() or not state.try_consume_tokens([draft]):
            break
        held += 1
        _fill(state, words[held])
    if state.is_error():
        return 0
    state.rollback(held)
    return held


def _forced(state: "LLMatcher") -> tuple[bytes, float]:
    """The text that must come next, and the seconds of a CPU that it took to find."""
    begun = time.thread_time()
    return state.compute_ff_bytes(), time.thread_time() - begun


def _fill(state: "LLMatcher", words: Mask) -> None:
    state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
