"""No grammar holds up who has none: compiling is done beside the steps, and a step that is too slow is given up."""

import threading
from itertools import count

import pytest
from grammars import GRAMMARS, TEXTS, answer, begun, engine, known
from mock_engine import submit
from mock_runner import oracle

from fwd.engine.grammar import FORCED_SECONDS, MOST_LEFT, TOO_SLOW
from fwd.engine.watch import Watch
from fwd.errors import GrammarError, OverloadedError
from fwd.grammar.compiled import LIMITS, NARROW, Tokens
from fwd.protocol.messages import Cancel, Failed

DIGITS = GRAMMARS["digits"][0]
AMBIGUOUS = {
    "pairs": 'lark:start: e\ne: e e | "a" | ""',
    "triples": 'lark:start: e\ne: e e e | e e | /[a-z]/ | ""',
    "both sides": 'lark:start: e\ne: e "a" | "a" e | e e | "a"',
}
LONG = "aaaaaaaaaaaaaaaa" * 64
A = TEXTS.index(b"a")


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguity_ends_by_the_items_of_a_row_and_not_by_time(name, monkeypatch):
    """A row's work grows with the square of its items: those are bounded, whoever is slow."""
    monkeypatch.setattr(known(), "_watch", Watch(1e9))
    matcher, taken = begun(AMBIGUOUS[name]), 0
    while taken < len(LONG) and not matcher.error and matcher.take(A):
        taken += 1
        matcher.prepare()
    assert taken < NARROW["lark"]["max_items_in_row"]
    assert "row has" in matcher.error or "Too many items" in matcher.error
    assert "\n" not in matcher.error


def test_the_limits_of_a_step_are_those_that_were_found():
    """At 2,000 items a row and 50,000 a step ambiguous rules took seconds; at these, tens of milliseconds."""
    assert NARROW["lark"]["max_items_in_row"] <= 500
    assert LIMITS["step_max_items"] <= 10_000
    assert LIMITS["step_lexer_fuel"] <= 50_000


class Stuck:
    """A state whose masks take for ever, by the clock of a CPU that its watch reads; nobody may touch it meanwhile."""

    def __init__(self, state, free):
        self._state, self._free, self._busy = state, free, False

    def __getattr__(self, name):
        assert not self._busy, "already borrowed"
        return getattr(self._state, name)

    def stay(self):
        """For ever."""
        assert not self._busy, "already borrowed"
        self._busy = threading.current_thread().stuck = True
        self._free.wait()
        self._busy = False

    def unsafe_compute_mask_ptr(self, *where):
        self.stay()
        self._state.unsafe_compute_mask_ptr(*where)


@pytest.fixture
def free():
    event = threading.Event()
    yield event
    event.set()
    for worker in threading.enumerate():
        if hasattr(worker, "stuck"):
            worker.join(10)


@pytest.fixture
def stuck(free, monkeypatch):
    """States of grammars that say so are stuck, and only they spend anything."""
    whole = Tokens.compiled

    def compiled(self, text):
        return Stuck(whole(self, text), free) if "stuck" in text else whole(self, text)

    monkeypatch.setattr(Tokens, "compiled", compiled)
    monkeypatch.setattr("fwd.engine.watch._Worker.spent", lambda worker: 9.0 * hasattr(worker, "stuck"))


@pytest.mark.usefixtures("stuck")
def test_a_step_that_takes_too_long_fails_its_request_alone():
    made = engine(seqs=2)
    made.handle(submit(1, [1], tokens=12), submit(2, [2], tokens=20, grammar="regex:(stuck)*"))
    made.handle(submit(3, [7], tokens=20, grammar=DIGITS, seed=1))
    made.idle()
    assert isinstance(made.results[2], Failed)
    assert made.results[2].code == GrammarError.code
    assert made.results[2].message == TOO_SLOW == "a step of the grammar takes more than 50 ms: simplify it"
    assert made.output[1] == oracle([1], 0, 12)
    assert made.output[3] == answer(DIGITS, [7], 1, 20)[0]
    assert 2 not in made.output
    made.space.check()


@pytest.mark.usefixtures("stuck")
def test_while_steps_that_were_given_up_go_on_nobody_begins_a_grammar(free):
    made = engine(seqs=2)
    for key in range(MOST_LEFT):
        made.handle(submit(key, [1], tokens=12, grammar=f"regex:(stuck){{{key + 1}}}"))
        made.idle()
        assert made.results[key].message == TOO_SLOW
    made.handle(submit(10, [7], tokens=20, grammar=DIGITS, seed=1), submit(11, [1], tokens=12))
    made.idle()
    assert made.results[10].code == OverloadedError.code
    assert made.output[11] == oracle([1], 0, 12)
    lasting = list(made.loop._grammars._watch._left)
    free.set()
    for worker in lasting:
        worker.join()
    made.handle(submit(12, [7], tokens=20, grammar=DIGITS, seed=1))
    made.idle()
    assert made.output[12] == answer(DIGITS, [7], 1, 20)[0]


def test_a_step_that_was_given_up_holds_nothing_of_others_with_its_grammar(free, monkeypatch):
    """Whatever is compiled once has one lock, which a step of it or of its copies holds: so it is in the library."""
    whole, held = Tokens.compiled, []

    class Locked(Stuck):
        def __init__(self, state, free, lock=None):
            super().__init__(state, free)
            self._lock = lock or threading.Lock()

        def deep_copy(self):
            return Locked(self._state.deep_copy(), self._free, self._lock)

        def consume_token(self, token):
            assert self._lock.acquire(blocking=False), "the loop is held up"
            self._lock.release()
            return self._state.consume_token(token)

        def unsafe_compute_mask_ptr(self, *where):
            with self._lock:
                if not held:
                    held.append(self)
                    self.stay()
            self._state.unsafe_compute_mask_ptr(*where)

    monkeypatch.setattr(Tokens, "compiled", lambda self, text: Locked(whole(self, text), free))
    monkeypatch.setattr("fwd.engine.watch._Worker.spent", lambda worker: 9.0 * hasattr(worker, "stuck"))
    made = engine(seqs=3)
    made.handle(*(submit(number, [7], tokens=20, grammar=DIGITS, seed=1) for number in (1, 2, 3)))
    made.idle()
    assert made.results[1].message == TOO_SLOW
    assert made.output == {number: answer(DIGITS, [7], 1, 20)[0] for number in (2, 3)}
    assert made.loop._grammars._watch.left == 1, "it goes on all the while"


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 4, 6, 12])
def test_no_further_drafts_are_looked_at_when_a_step_has_taken_long(milliseconds, monkeypatch):
    found, other = begun(GRAMMARS["any"][0]), begun(GRAMMARS["any"][0])
    drafts = [TEXTS.index(text) for text in (b"[1", b",", b"[", b"[", b"]", b",")]

    def prepare(matcher, milliseconds):
        clock = count(step=milliseconds / 1e3)
        monkeypatch.setattr("fwd.engine.grammar.time.thread_time", lambda: next(clock))
        return matcher.prepare(drafts)

    assert prepare(other, 0) == 6
    held = prepare(found, milliseconds)
    assert held == (6 if milliseconds < 2 else 10 // milliseconds)
    assert [mask.tolist() for mask in found.masks] == [mask.tolist() for mask in other.masks[: held + 1]]
    assert prepare(found, 0) == 6, "nothing is spoiled"
    assert (found._alone, found.error) == (False, "")


@pytest.mark.usefixtures("stuck")
def test_drafts_that_take_too_long_are_done_without(free):
    class Slow(Stuck):
        def try_consume_tokens(self, ids):
            self.stay()
            return 0

        def unsafe_compute_mask_ptr(self, *where):
            self._state.unsafe_compute_mask_ptr(*where)

    found, other = (begun(DIGITS) for _ in range(2))
    found._state = Slow(found._state, free)
    assert found.prepare([A, A]) == other.prepare() == 0
    assert not found.error
    assert [mask.tolist() for mask in found.masks] == [mask.tolist() for mask in other.masks]
    assert found.forced(5) == ()


@pytest.mark.usefixtures("stuck")
def test_forced_text_that_takes_too_long_to_find_is_done_without(free):
    class Slow(Stuck):
        def compute_ff_bytes(self):
            self.stay()
            return b""

    found, other = (begun(GRAMMARS["tight"][0]) for _ in range(2))
    found._state = Slow(found._state, free)
    assert found.forced(5) == ()
    assert found.prepare([A]) == other.prepare() == 0
    assert not found.error
    assert [mask.tolist() for mask in found.masks] == [mask.tolist() for mask in other.masks]


def test_forced_text_that_was_dear_to_find_is_not_looked_for_again(monkeypatch):
    clock, found = count(step=FORCED_SECONDS), begun(GRAMMARS["tight"][0])
    monkeypatch.setattr("fwd.engine.grammar.time.thread_time", lambda: next(clock))
    ids = found.forced(5)
    assert len(ids) > 1
    assert found.forced(5) == ()
    assert found.take(ids[0])
    assert found.forced(5) == ()
    assert found.prepare() == 0
    assert not found.error


@pytest.mark.usefixtures("stuck")
@pytest.mark.parametrize("way", ["drafts", "forced"])
def test_a_state_that_takes_too_long_to_be_made_again_fails_its_request(way, free):
    class Slow(Stuck):
        def compute_ff_bytes(self):
            self.stay()

    found = begun(DIGITS)
    assert found.take(TEXTS.index(b"1"))
    found._grammar, found._state = "regex:(stuck)*", Slow(found._state, free)
    if way == "forced":
        assert found.forced(5) == ()
        assert found.error == TOO_SLOW
    assert found.prepare([A]) == 0
    assert found.error == TOO_SLOW
    assert not found.take(A)
    assert found.forced(5) == ()


def test_others_go_on_while_a_grammar_is_compiled(free, monkeypatch):
    made, whole = engine(seqs=2), Tokens.compiled

    def slow(self, text):
        free.wait()
        return whole(self, text)

    monkeypatch.setattr(Tokens, "compiled", slow)
    made.handle(submit(2, [7], tokens=20, grammar=DIGITS, seed=1), submit(1, [1], tokens=12))
    made.until(1)
    assert made.output[1] == oracle([1], 0, 12)
    assert 2 not in made.output
    free.set()
    made.until(2)
    assert made.output[2] == answer(DIGITS, [7], 1, 20)[0]


def test_requests_are_cancelled_while_a_grammar_is_compiled(free, monkeypatch):
    made, whole, at_work = engine(), Tokens.compiled, threading.Event()
    compiled = []

    def slow(self, text):
        compiled.append(text)
        at_work.set()
        free.wait()
        return whole(self, text)

    monkeypatch.setattr(Tokens, "compiled", slow)
    made.handle(submit(1, [7], grammar=DIGITS), submit(2, [7], grammar=DIGITS))
    at_work.wait()
    made.handle(Cancel(id=1), Cancel(id=2))
    assert [made.results[number].reason for number in (1, 2)] == ["cancelled"] * 2
    free.set()
    made.idle()
    assert made.output == {}
    assert made.ask(3, [1], tokens=3)[0] == oracle([1], 0, 3)
    made.ask(4, [1], tokens=1, grammar=GRAMMARS["words"][0])
    assert compiled == [DIGITS, GRAMMARS["words"][0]], "what had not begun is not compiled"
