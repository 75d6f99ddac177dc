"""What a grammar is and how it is compiled (llguidance: an Earley parser over regular expressions).

A grammar is `json_schema:{…}`, `regex:…` (the whole answer matches it) or `lark:…` (llguidance's dialect of Lark, or
llama.cpp's GBNF). It says which text may come, never how that is cut into tokens: every token whose bytes fit may be
drawn. Ids that end an answer may be where the text is whole, and where nothing else may come the answer ends by itself.
"""

import json
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fwd.errors import BadFrameError, GrammarError
from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

KINDS = ("json_schema", "regex", "lark")
CUTS = 1024  # texts whose tokens are remembered: the keys of objects come again
STEP_SECONDS = 0.05  # of a CPU that the masks of one step may take; half of it when a grammar is tried
LIMITS = {  # of llguidance, for a step: 1,000 optional properties take 5,000 items, all else far less
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 10_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": True,
    "verbose_errors": False,
}
# Rules may be ambiguous, and then each row costs the square of its items or more.
NARROW = {"lark": {"max_items_in_row": 500}}
# The model is left to choose how forced text is cut; the grammar itself stands beside this one and is named.
_TEXT = '%llguidance {"no_forcing": true}\nstart: @text'


class Tokens:
    """The vocabulary as the library wants it, and how text is likely cut into its tokens.

    `vocab` is how many ids logits have. `ends` are the ids that end an answer; they and the special ones are no text,
    nor are those without any.
    """

    def __init__(self, vocabulary: Vocabulary, vocab: int) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415  # only who asks for grammars pays

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
        self._cut = lru_cache(CUTS)(self._merged)
        self.table = LLTokenizer(TokenizerWrapper(self), eos_token=sorted(self.ends) or None)

    def __call__(self, text: bytes) -> tuple[int, ...]:
        """Cut text into tokens by merging neighbours, the pair that makes the lowest id first.

        That is how byte-pair encoding does it where ids are in the order of the merges (Sennrich et al. 2016), as they
        mostly are. A byte that is no token, and all after it, is left out.
        """
        return self._cut(text)

    def compiled(self, grammar: str) -> "LLMatcher":
        """The state before the first token; raises `GrammarError`. The GIL is let go meanwhile."""
        from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415

        text, limits = serialised(grammar), {**LIMITS, **NARROW.get(grammar.partition(":")[0], {})}
        found = LLMatcher(self.table, text, log_level=0, limits=LLParserLimits(**limits))  # type: ignore[arg-type]
        if found.is_error():
            raise GrammarError(f"the grammar cannot be compiled: {reason(found)}")
        return found

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


def serialised(grammar: str) -> str:
    """The grammar as the library takes it; raises `GrammarError` for a form that is not known."""
    kind, colon, body = grammar.partition(":")
    if not colon or kind not in KINDS:
        raise GrammarError(f"the grammar begins with {grammar[:16]!r}: it must be json_schema:…, regex:… or lark:…")
    return json.dumps({"grammars": [{"lark_grammar": _TEXT}, {"name": "text", **_named(kind, body)}]})


def _named(kind: str, body: str) -> dict[str, Any]:
    if kind == "lark":
        return {"lark_grammar": _lark(body)}
    if kind == "regex":
        from llguidance import LLMatcher  # noqa: PLC0415

        grammar: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(body))["grammars"][0]
        return {"lark_grammar": grammar["lark_grammar"]}
    try:
        return {"json_schema": json.loads(body)}
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema cannot be read: {error}") from None


def _lark(body: str) -> str:
    if "::=" not in body:
        return body
    from llguidance.gbnf_to_lark import gbnf_to_lark  # noqa: PLC0415

    try:
        return gbnf_to_lark(body)
    except Exception as error:  # noqa: BLE001  # the library does not say which
        raise GrammarError(f"the GBNF grammar cannot be read: {' '.join(str(error).split())[:300]}") from None


def texts_of(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes of each token; raises `BadFrameError` if the table is not whole."""
    check_vocabulary(vocabulary)
    return [bytes(vocabulary.text[begin:end]) for begin, end in pairwise([0, *unpack_ids(vocabulary.ends)])]


def check_vocabulary(vocabulary: Vocabulary) -> None:
    """Raise `BadFrameError` if its texts do not follow each other."""
    if any(after < before for before, after in pairwise([0, *unpack_ids(vocabulary.ends), vocabulary.text.nbytes])):
        raise BadFrameError("the text of a vocabulary does not end where its tokens do")


def reason(state: "LLMatcher") -> str:
    """What the library says, in one line."""
    return " ".join(state.get_error().replace("<non-verbose/>", "").split())[:300]
