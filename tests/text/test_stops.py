import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwd.text.stops import StopMatcher


def reference(stops, text, include):
    """The naive rule on the whole text: the first character that completes a stop decides, the longest wins there."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@st.composite
def splits(draw, alphabet="ab\n"):
    return draw(st.lists(st.text(alphabet, max_size=4), max_size=12))


@given(stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4), pieces=splits(), include=st.booleans())
def test_any_split_gives_what_the_whole_text_gives(stops, pieces, include):
    matcher = StopMatcher(stops, include)
    got = "".join([*map(matcher.push, pieces), matcher.flush()])
    assert (got, matcher.matched) == reference(stops, "".join(pieces), include)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), pieces=splits("ab"))
def test_nothing_leaks_and_nothing_is_held_longer_than_needed(stops, pieces):
    matcher = StopMatcher(stops)
    seen, sent = "", ""
    for piece in pieces:
        seen += piece
        sent += matcher.push(piece)
        if matcher.matched is not None:
            break
        held = seen.removeprefix(sent)
        assert seen == sent + held
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(
            seen[len(sent) - extra :] in {s[:i] for s in stops for i in range(1, len(s))}
            for extra in range(1, len(sent) + 1)
        )


def test_a_stop_over_many_tokens():
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ("Hi", "\n", "\n", "Us", "er", ":", " more")] == ["Hi", *[""] * 6]
    assert matcher.matched == "\n\nUser:"
    assert matcher.flush() == ""


def test_a_partial_match_that_fails_is_given_back_whole():
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(piece) for piece in ("a <", "/en", "x")] == ["a ", "", "</enx"]
    assert matcher.matched is None


def test_the_first_complete_stop_wins_and_of_two_at_once_the_longest():
    first = StopMatcher(["abcd", "bc"])
    assert first.push("abcd") == "a"
    assert first.matched == "bc"
    longest = StopMatcher(["c", "bc"])
    assert longest.push("abc") == "a"
    assert longest.matched == "bc"


def test_included_stop_is_emitted_and_nothing_after_it():
    matcher = StopMatcher(["."], include=True)
    assert (matcher.push("One. Two"), matcher.push("."), matcher.flush()) == ("One.", "", "")


def test_without_stops_text_passes_untouched():
    matcher = StopMatcher([])
    text = "some text"
    assert matcher.push(text) is text


def test_an_empty_stop_is_a_programmer_error():
    with pytest.raises(AssertionError):
        StopMatcher([""])


def test_memory_is_linear_in_the_length_of_the_stops():
    stops = [chr(0x10000 + n) * 1023 + "x" for n in range(16)]
    tracemalloc.start()
    try:
        matchers = [StopMatcher(stops) for _ in range(16)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()
    assert matchers[0].push(stops[3][:-1]) == ""
    assert (matchers[0].push("x"), matchers[0].matched) == ("", stops[3])
