"""Grammars: which tokens may come next, told from their bytes (llguidance: an Earley parser over regular expressions).

A grammar is `json_schema:{…}`, `regex:…` (the whole answer matches it) or `lark:…` (llguidance's dialect of Lark). It
says which text may come, never how that is cut into tokens: every token whose bytes fit may be drawn. Ids that end an
answer may be where the text is whole, and where nothing else may come the answer ends by itself.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fwd.errors import BadFrameError, GrammarError
from fwd.kernels.sizes import MAX_ROWS, mask_words
from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

Mask = NDArray[np.uint32]
KINDS = ("json_schema", "regex", "lark")
KEPT = 8  # compiled grammars
FORCED_BYTES = 64  # of forced text that are cut into drafts
CUTS = 1024  # texts whose tokens are remembered: the keys of objects come again
LIMITS = {  # of llguidance; some 20 ms for compiling a lexer, 10 ms and 50 MB of its states for a request
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": True,
    "verbose_errors": False,
}
# The model is left to choose how forced text is cut; the grammar itself stands beside this one and is named.
_TEXT = '%llguidance {"no_forcing": true}\nstart: @text'


class Grammars:
    """Compiles the grammars of one model, whose logits have `vocab` ids. The library is imported with the first one."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._tokens: Tokens | None = None
        self._limits: LLParserLimits | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def learn(self, vocabulary: Vocabulary) -> None:
        """Take the text of the tokens, about 1 s for 100,000; raises `BadFrameError` if it is not whole."""
        from llguidance import LLParserLimits  # noqa: PLC0415  # only who asks for grammars pays

        self._tokens = Tokens(vocabulary, self._vocab)
        self._limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]  # bool and int
        self._compiled.clear()

    def matcher(self, grammar: str, emitted: Sequence[int]) -> "Matcher":
        """A matcher that stands after the ids that are known; raises `GrammarError` if they do not follow from it."""
        if self._tokens is None:
            raise BadFrameError("a request with a grammar came before the vocabulary")
        matcher = Matcher(self._tokens, self._compile(grammar))
        if all(map(matcher.take, emitted)):
            matcher.prepare()
        if matcher.error:
            raise GrammarError(matcher.error)
        return matcher

    def _compile(self, grammar: str) -> "LLMatcher":
        """The state before the first token; choices of one request share the work."""
        from llguidance import LLMatcher  # noqa: PLC0415

        if grammar not in self._compiled:
            assert self._tokens
            found = LLMatcher(self._tokens.table, serialised(grammar), log_level=0, limits=self._limits)
            if found.is_error():
                raise GrammarError(f"the grammar cannot be compiled: {_reason(found)}")
            self._compiled[grammar] = found
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar]


class Tokens:
    """The vocabulary as the library wants it, and how text is likely cut into its tokens.

    `ends` are the ids that end an answer; they and the special ones are no text, nor are those without any.
    """

    def __init__(self, vocabulary: Vocabulary, vocab: int) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415

        texts = texts_of(vocabulary)[:vocab]
        self.tokens = [*texts, *[b""] * (vocab - len(texts))]
        self.ends = frozenset(token for token in vocabulary.eos if token < vocab)
        special = {token for token in unpack_ids(vocabulary.special) if 0 <= token < vocab}
        self.special_token_ids = sorted(special | self.ends)
        # Without an id that ends an answer one more stands for it, which no mask is read for.
        self.eos_token_id = min(self.ends, default=None)
        self.bos_token_id = None
        hidden = set(self.special_token_ids)
        self._ids = {text: token for token, text in reversed([*enumerate(texts)]) if token not in hidden and text}
        self.words = mask_words(vocab)
        self._cut = lru_cache(CUTS)(self._merged)
        self.table = LLTokenizer(TokenizerWrapper(self), eos_token=sorted(self.ends) or None)

    def __call__(self, text: bytes) -> tuple[int, ...]:
        """Cut text into tokens by merging neighbours, the pair that makes the lowest id first.

        That is how byte-pair encoding does it where ids are in the order of the merges (Sennrich et al. 2016), as they
        mostly are. A byte that is no token, and all after it, is left out.
        """
        return self._cut(text)

    def _merged(self, text: bytes) -> tuple[int, ...]:
        parts = [bytes([byte]) for byte in text]
        while True:
            pairs = [self._ids.get(left + right, -1) for left, right in pairwise(parts)]
            best = min((token for token in pairs if token >= 0), default=-1)
            if best < 0:
                break
            place = pairs.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids = [self._ids.get(part, -1) for part in parts]
        return tuple(ids[: ids.index(-1)] if -1 in ids else ids)


class Matcher:
    """Where one request stands in its grammar: after all the ids it has been given with `take`.

    `masks` are the ids that may come after these and after each draft of the latest `prepare`: [⌈vocab/32⌉] each, valid
    until the next `prepare`. `ended`: nothing may follow. `error`: it cannot go on, and why.
    """

    def __init__(self, tokens: Tokens, start: "LLMatcher") -> None:
        self._tokens = tokens
        self._start = start
        self._state = start.deep_copy()
        self._ids: list[int] = []
        # One word more for the id that a vocabulary without an end is given.
        self._words = np.zeros((MAX_ROWS, mask_words(tokens.table.vocab_size)), np.uint32)
        self.masks: list[Mask] = []
        self.ended = False
        self.error = ""
        self._alone = False  # drafts have spoiled the state once: from then on there are none

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self._tokens.ends

    def take(self, token: int) -> bool:
        """Go on by a committed id; False, and `error` says why, if it may not stand there."""
        if self.error or self.ended or not self._advance(token):
            self.error = self.error or f"the grammar cannot go on with token {token}: {_reason(self._state)}"
            return False
        self._ids.append(token)
        self.ended = self._state.is_stopped() or token in self.ends
        return True

    def prepare(self, drafts: Sequence[int] = ()) -> int:
        """Have `masks` for the next row and the rows of drafts: returns how many drafts the grammar lets stand.

        Drafts never decide: where only they are beyond the limits there are none from then on, and a state that they
        have spoiled is made again as it would be without them.
        """
        held = self._walk(() if self._alone else drafts)
        if self._state.is_error() and not self.error:
            self._state = self._remade()
            held = self._walk(())
        if self._state.is_error():
            self.error = self.error or f"the grammar cannot go on: {_reason(self._state)}"
        return held

    def forced(self, most: int) -> tuple[int, ...]:
        """Ids of the text that must come next, but the last, which may reach into what comes after it."""
        if self.ended or self.error or self._alone:
            return ()
        text = self._state.compute_ff_bytes()
        if self._state.is_error():
            self._state = self._remade()
        return self._tokens(text[:FORCED_BYTES])[:-1][:most]

    def _walk(self, drafts: Sequence[int]) -> int:
        """Fill in the masks along the drafts and come back."""
        held = 0
        self._fill(0)
        while held < len(drafts) and not self._state.is_stopped() and self._state.try_consume_tokens([drafts[held]]):
            held += 1
            self._fill(held)
        if self._state.is_error():
            return 0
        self._state.rollback(held)
        self.masks = [self._words[row, : self._tokens.words] for row in range(held + 1)]
        return held

    def _fill(self, row: int) -> None:
        words = self._words[row]
        self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def _advance(self, token: int) -> bool:
        if self._state.consume_token(token):
            return True
        self._state = self._remade()
        return bool(self._state.consume_token(token))

    def _remade(self) -> "LLMatcher":
        """The state as it is without any drafts: what was looked at on the way has used up some of the limits.

        It takes as long as the answer is, so it is done once.
        """
        self._alone = True
        state, words = self._start.deep_copy(), self._words[0]
        for token in self._ids:
            state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            state.consume_token(token)
        return state


def serialised(grammar: str) -> str:
    """The grammar as the library takes it; raises `GrammarError` for a form that is not known."""
    kind, colon, body = grammar.partition(":")
    if not colon or kind not in KINDS:
        raise GrammarError(f"the grammar begins with {grammar[:16]!r}: it must be json_schema:…, regex:… or lark:…")
    return json.dumps({"grammars": [{"lark_grammar": _TEXT}, {"name": "text", **_named(kind, body)}]})


def _named(kind: str, body: str) -> dict[str, Any]:
    if kind == "lark":
        return {"lark_grammar": body}
    if kind == "regex":
        from llguidance import LLMatcher  # noqa: PLC0415

        grammar: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(body))["grammars"][0]
        return {"lark_grammar": grammar["lark_grammar"]}
    try:
        return {"json_schema": json.loads(body)}
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema cannot be read: {error}") from None


def texts_of(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes of each token; raises `BadFrameError` if the table is not whole."""
    ends, size = unpack_ids(vocabulary.ends), vocabulary.text.nbytes
    if any(after < before for before, after in pairwise([0, *ends, size])):
        raise BadFrameError("the text of a vocabulary does not end where its tokens do")
    return [bytes(vocabulary.text[begin:end]) for begin, end in pairwise([0, *ends])]


def _reason(state: "LLMatcher") -> str:
    """What the library says, in one line."""
    return " ".join(state.get_error().replace("<non-verbose/>", "").split())[:300]
