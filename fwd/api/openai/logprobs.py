"""Log-probabilities in the shapes of chat (items) and completions (columns), with the true bytes of each token."""

from collections.abc import Iterator, Sequence
from typing import Any

from fwd.front.streams import Stream
from fwd.protocol.values import TopLogprobs
from fwd.text.detokenize import Detokenizer
from fwd.text.tokenizer import Tokenizer

FLOOR = -9999.0
NONE = TopLogprobs()


class Score:
    """One token of a text: its log-probability, None where there is none, and the likeliest in its place."""

    __slots__ = ("logprob", "token", "top")

    def __init__(self, token: int, logprob: float | None, top: TopLogprobs) -> None:
        self.token = token
        self.logprob = None if logprob is None else max(logprob, FLOOR)
        self.top = [(other, max(value, FLOOR)) for other, value in zip(top.ids, top.logprobs, strict=True)]


def output_scores(stream: Stream, start: int, end: int) -> Iterator[Score]:
    """Scores of output tokens `start` … `end` − 1; the stream must have been asked for them."""
    for index in range(start, end):
        place = index - stream.given
        yield Score(stream.emitted[index], stream.logprobs[place], _at(stream.top, place))


def prompt_scores(stream: Stream) -> Iterator[Score]:
    """Scores of the prompt's tokens, once the stream has its first output token or its end.

    A stream that was cancelled before its prefill was done has none for the last of them.
    """
    yield Score(stream.prompt[0], None, NONE)
    for place, token in enumerate(stream.prompt[1:]):
        if place < len(stream.prompt_logprobs):
            yield Score(token, stream.prompt_logprobs[place], _at(stream.prompt_top, place))
        else:
            yield Score(token, None, NONE)


def _at(tops: Sequence[TopLogprobs], place: int) -> TopLogprobs:
    return tops[place] if tops else NONE


def chat_items(tokenizer: Tokenizer, scores: Iterator[Score]) -> list[dict[str, Any]]:
    """The items of `logprobs.content`."""
    return [
        {
            **_item(tokenizer, score.token, score.logprob),
            "top_logprobs": [_item(tokenizer, token, logprob) for token, logprob in score.top],
        }
        for score in scores
    ]


def _item(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    return {"token": tokenizer.token_text(token), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}


class Columns:
    """The columnar shape of completions, made piece by piece; offsets count the characters of the text so far."""

    def __init__(self, tokenizer: Tokenizer, *, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, continues=continues)
        self._offset = 0

    def take(self, scores: Iterator[Score]) -> dict[str, list[Any]]:
        """The columns of the next tokens."""
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            columns["tokens"].append(self._tokenizer.token_name(score.token))
            columns["token_logprobs"].append(score.logprob)
            columns["top_logprobs"].append(self._top(score))
            columns["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.push([score.token]))
        return columns

    def _top(self, score: Score) -> dict[str, float] | None:
        if score.logprob is None:
            return None
        return {
            self._tokenizer.token_name(token): logprob for token, logprob in [*score.top, (score.token, score.logprob)]
        }
