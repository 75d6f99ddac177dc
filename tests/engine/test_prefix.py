"""What is found again, why not more, what goes first, and what a finished answer leaves."""

import random

import pytest
from mock_engine import CHUNK, PAGE, Engine, submit
from mock_runner import FULL, STATE, VOCAB, oracle, sliding

from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Cancel
from fwd.protocol.values import Limits


def text(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def told(timing):
    return timing.cached_tokens, timing.cache_miss, timing.differs_at


def test_a_first_prompt_was_never_seen_and_the_same_again_is_cached_but_for_its_last_token():
    engine, prompt = Engine(), text(1, 4 * PAGE)

    assert told(engine.ask(1, prompt)[1]) == (0, "never_seen", -1)
    engine.idle()
    before = engine.prefilled
    assert told(engine.ask(2, prompt)[1]) == (3 * PAGE, "", -1)
    assert engine.prefilled - before == PAGE


def test_the_second_turn_computes_its_own_tokens_only_once_the_answer_was_prefilled_again():
    engine, prompt = Engine(), text(1, 21)
    answer, _ = engine.ask(1, prompt, tokens=11)
    engine.idle()
    before, turn = engine.prefilled, [*prompt, *answer, *text(2, 7)]
    _, timing = engine.ask(2, turn)

    assert told(timing) == (32 // PAGE * PAGE, "never_seen", -1)
    assert engine.prefilled - before == len(turn) - timing.cached_tokens


def test_a_second_turn_that_comes_at_once_computes_the_first_answer_once():
    engine, prompt = Engine(), text(1, 21)
    answer, _ = engine.ask(1, prompt, tokens=11)
    turn = [*prompt, *answer, *text(2, 7)]
    _, timing = engine.ask(2, turn)
    third = [*turn, *engine.output[2], *text(3, 3)]

    assert told(timing) == (20, "never_seen", -1)
    assert engine.ask(3, third)[1].cached_tokens == len(turn) // PAGE * PAGE


def test_a_request_drops_the_prefill_of_an_ended_answer_at_once_and_it_is_done_later():
    engine, prompt = Engine(), text(1, 8)
    answer, _ = engine.ask(1, prompt, tokens=30)
    engine.step()
    assert engine.runner.launches[-1][:2] == ("prefill", 0)
    engine.handle(submit(2, text(2, 5)))
    engine.step()
    assert engine.runner.launches[-1][:2] == ("prefill", 2)
    engine.idle()

    assert engine.ask(3, [*prompt, *answer, 1])[1].cached_tokens == 36


@pytest.mark.parametrize(("common", "at"), [(PAGE, PAGE), (PAGE + 1, PAGE + 1), (3 * PAGE - 1, 3 * PAGE - 1), (2, 2)])
def test_where_a_prompt_differs_is_told(common, at):
    engine, prompt = Engine(), text(1, 4 * PAGE)
    engine.ask(1, prompt)
    other = [*prompt[:common], (prompt[common] + 1) % VOCAB, *text(2, 3 * PAGE)]

    assert told(engine.ask(2, other)[1]) == (common // PAGE * PAGE, "differs", at)


def test_another_prompt_altogether_was_never_seen():
    engine = Engine()
    engine.ask(1, [1] * 12)

    assert told(engine.ask(2, [2] * 12)[1]) == (0, "never_seen", -1)


@pytest.mark.parametrize("groups", [(STATE,), (sliding(1),), (sliding(1), STATE)])
def test_a_prompt_whose_beginning_is_evicted_while_it_is_read_is_found_again(groups):
    """Nothing of the request itself holds the pages it went on from."""
    engine, known = Engine(groups, (60,) * len(groups)), text(1, 2 * CHUNK)
    engine.ask(1, known, 1)
    engine.handle(submit(2, [*known, *text(2, 3 * CHUNK)], 1))
    engine.step()
    while any(map(engine.space.tree.evict, range(len(groups)))):
        pass
    engine.until(2)
    engine.idle()

    assert engine.ask(3, [*known, *text(2, 3 * CHUNK), 1], 1)[1].cached_tokens == 5 * CHUNK
    while any(map(engine.space.tree.evict, range(len(groups)))):
        pass
    assert len(engine.space.tree) == 0


def test_what_was_evicted_is_told():
    engine, prompt = Engine(units=(8,)), text(1, 4 * PAGE)
    engine.ask(1, prompt, tokens=1)
    engine.ask(2, text(2, 7 * PAGE), tokens=1)

    cached, miss, _ = told(engine.ask(3, prompt, tokens=1)[1])
    assert cached < 3 * PAGE
    assert miss == "evicted"


def test_pages_of_another_adapter_are_not_used():
    engine, prompt = Engine(), text(1, 4 * PAGE)
    engine.ask(1, prompt, adapter="a")

    assert told(engine.ask(2, prompt, adapter="b")[1]) == (0, "adapter", -1)
    assert engine.ask(3, prompt, adapter="a")[1].cached_tokens == 3 * PAGE


def test_a_prefix_whose_window_is_gone_is_no_hit():
    window = 6
    engine = Engine((FULL, sliding(window)), (64, 4 * 5 + 2))
    prompt = text(1, 40)
    engine.ask(1, prompt, tokens=1)
    while engine.space.tree.evict(1):
        pass

    assert told(engine.ask(2, prompt, tokens=1)[1]) == (0, "window", -1)


@pytest.mark.parametrize("evicted", range(14))
@pytest.mark.parametrize("window", [1, 2, 5, 6, 9])
def test_a_hit_needs_each_page_of_the_window(window, evicted):
    """The mock model checks every cell that the rows of the second request see."""
    engine = Engine((FULL, sliding(window)), (64, 4 * 8 + 8))
    prompt = text(1, 24)
    engine.ask(1, prompt, tokens=1)
    engine.idle()
    for _ in range(evicted):
        engine.space.tree.evict(1)
    output, timing = engine.ask(2, [*prompt, 3, 3, 3], tokens=2)

    assert output == oracle([*prompt, 3, 3, 3], 0, 2)
    assert timing.cache_miss == ("" if timing.cached_tokens == 24 else "window")


def test_a_long_prompt_does_not_drive_out_the_windows_of_other_conversations():
    engine = Engine((FULL, sliding(6)), (200, 4 * 5 + 8))
    first = text(1, 24)
    engine.ask(1, first, tokens=1)
    engine.ask(2, text(2, 400), tokens=1)

    assert engine.ask(3, [*first, 5, 5], tokens=1)[1].cached_tokens == 24


def test_states_are_found_at_chunk_boundaries():
    engine, prompt = Engine((STATE,), (64,)), text(1, 3 * CHUNK + 5)
    engine.ask(1, prompt, tokens=1)
    engine.idle()

    assert engine.ask(2, [*prompt, 1, 2], tokens=1)[1].cached_tokens == 3 * CHUNK
    assert engine.ask(3, prompt[: 2 * CHUNK + 3], tokens=1)[1].cached_tokens == 2 * CHUNK


def test_nothing_is_kept_of_a_request_that_asks_for_none():
    engine, prompt = Engine(), text(1, 5 * PAGE)
    engine.ask(1, prompt, tokens=9, cache=False)
    engine.idle()

    assert engine.space.main.cached == 0
    assert told(engine.ask(2, prompt)[1]) == (0, "never_seen", -1)


def test_a_request_that_wants_prompt_scores_computes_all_of_its_prompt():
    engine, prompt = Engine(), text(1, 5 * PAGE)
    engine.ask(1, prompt)

    assert engine.ask(2, prompt, prompt_logprobs=0)[1].cached_tokens == 0


def test_the_least_recently_used_leaf_goes_first():
    engine = Engine(units=(12,))
    for number, prompt in enumerate((text(1, 9), text(2, 9), text(1, 9)), 1):
        engine.ask(number, prompt, tokens=1)
    engine.ask(4, text(3, 8 * PAGE + 1), tokens=1)

    assert engine.ask(5, text(1, 9), tokens=1)[1].cached_tokens == 2 * PAGE
    assert engine.ask(6, text(2, 9), tokens=1)[1].cached_tokens < 2 * PAGE


def test_a_pinned_session_outlives_what_was_used_after_it_until_nothing_else_is_left():
    engine = Engine(units=(12,))
    engine.ask(1, text(1, 9), tokens=1, cache_key="session")
    for number in range(2, 8):
        engine.ask(number, text(number, 20), tokens=1)
    assert engine.ask(8, text(1, 9), tokens=1, cache_key="session")[1].cached_tokens == 2 * PAGE

    engine.ask(9, text(9, 11 * PAGE), tokens=1)
    assert engine.ask(10, text(1, 9), tokens=1)[1].cached_tokens < 2 * PAGE


def test_a_session_pins_its_last_turn_only_and_at_most_half_of_the_pages():
    engine = Engine(units=(32,))
    engine.ask(1, text(1, 9), tokens=1, cache_key="session")
    engine.ask(2, text(2, 9), tokens=1, cache_key="session")
    assert engine.space.tree._pinned == 2
    for number in range(3, 20):
        engine.ask(number, text(number, 9), tokens=1, cache_key=f"session {number}")
        assert engine.space.tree._pinned <= 16


def test_hashes_depend_on_the_key():
    engines = [Engine(key=key) for key in (b"one", b"two")]
    for engine in engines:
        engine.ask(1, text(1, 9))

    assert not set(engines[0].space.tree._nodes) & set(engines[1].space.tree._nodes)


def test_choices_of_one_prompt_share_its_prefill():
    engine, prompt = Engine(seqs=16), text(1, 4 * PAGE + 3)
    engine.handle(*(submit(number, prompt, 6, choice=number) for number in range(1, 9)))
    engine.until(*range(1, 9))

    assert engine.prefilled == len(prompt)
    assert engine.runner.copied == 7
    for number in range(1, 9):
        assert engine.output[number] == oracle(prompt, 0, 6, choice=number)
        assert told(engine.results[number].timing)[1] == ("never_seen" if number == 1 else "")


def test_who_shares_a_prefill_survives_the_cancel_of_its_leader():
    engine, prompt = Engine(seqs=16), text(1, 6 * CHUNK)
    engine.handle(*(submit(number, prompt, 3, choice=number) for number in range(1, 4)))
    engine.step()
    engine.step()
    engine.handle(Cancel(id=1))
    engine.until(1, 2, 3)

    assert engine.prefilled == len(prompt)
    assert engine.output[3] == oracle(prompt, 0, 3, choice=3)


def test_an_interactive_request_never_waits_for_a_background_one():
    engine, prompt = Engine(units=(20,)), text(1, 40)
    engine.handle(submit(1, prompt, priority="background"))
    engine.step()
    engine.handle(submit(2, prompt))
    engine.step()
    engine.handle(submit(3, text(2, 40)))
    engine.idle()

    assert set(engine.results) == {1, 2, 3}
    assert engine.space.main.available == 20


def test_who_shares_a_prefill_is_told_so_and_its_session_is_pinned_too():
    engine, prompt = Engine(), text(1, 40)
    engine.handle(*(submit(number, prompt, 1, cache_key=f"session {number}") for number in (1, 2)))
    engine.until(1, 2)

    assert [engine.results[number].timing.cached_tokens for number in (1, 2)] == [0, 40]
    assert list(engine.space.tree._sessions) == ["session 1", "session 2"]


def test_who_lost_the_leader_is_told_what_it_found_itself():
    engine, prompt = Engine(), text(1, 40)
    engine.handle(submit(1, prompt), submit(2, prompt, choice=1))
    engine.step()
    engine.handle(Cancel(id=1))
    engine.until(2)

    assert told(engine.results[2].timing) == (CHUNK, "never_seen", -1)


def test_a_request_that_keeps_nothing_leads_none_that_does():
    engine, prompt = Engine(), text(1, 40)
    engine.handle(submit(1, prompt, 1, cache=False), submit(2, prompt, 1, choice=1))
    engine.until(1, 2)

    assert engine.ask(3, [*prompt, 1], 1)[1].cached_tokens == 40


def test_a_session_is_pinned_to_the_end_of_its_answer():
    """The last chunk of the answer would add no whole page, and is not computed."""
    engine = Engine()
    engine.ask(1, text(1, 10), 8, cache_key="session")
    engine.idle()

    assert len(list(engine.space.tree._sessions["session"].path())) == len(engine.space.tree) == 4


@pytest.mark.parametrize("turns", [1, 5])
def test_a_pin_moves_with_its_session(turns):
    engine, prompt = Engine(units=(200,)), text(1, 9)
    for number in range(1, turns + 1):
        answer, _ = engine.ask(number, prompt, 6, cache_key="session")
        engine.idle()
        prompt = [*prompt, *answer, *text(number, 3)]
    tree = engine.space.tree
    assert (
        tree._pinned == sum(node.pins for node in tree._nodes.values()) == len(list(tree._sessions["session"].path()))
    )
    engine.ask(99, text(99, 30), 1, cache_key="session")

    assert tree._pinned == sum(node.pins for node in tree._nodes.values()) == 7


@pytest.mark.parametrize("groups", [(sliding(6),), (sliding(1),), (STATE,), (sliding(1), STATE)])
def test_without_a_full_group_the_tree_stays_in_its_bounds(groups):
    engine = Engine(groups, (40,) * len(groups), seqs=1, nodes=60)
    for number in range(1, 30):
        engine.ask(number, text(number, 200), 2)
        engine.idle()
        assert len(engine.space.tree) <= 60


def test_a_request_that_is_not_finite_leaves_nothing_for_others():
    engine, prompt = Engine(), text(1, 40)
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda chunk: prefill(chunk)._replace(finite=chunk.start < 16)
    engine.handle(submit(1, prompt), submit(2, prompt, choice=1))
    engine.until(1, 2)
    engine.runner.prefill = prefill

    assert [engine.results[number].code for number in (1, 2)] == ["non_finite_logits"] * 2
    assert engine.ask(3, prompt)[1].cached_tokens == 16


def test_an_answer_that_is_not_finite_when_it_is_read_again_is_dropped():
    engine, prefill = Engine(), None
    engine.ask(1, text(1, 8), 30)
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda chunk: prefill(chunk)._replace(finite=False)
    engine.idle()

    assert len(engine.space.tree) == 2
    assert engine.space.main.available == engine.space.main.total


def test_requests_that_come_together_and_share_a_beginning_compute_it_once():
    engine, system = Engine(units=(200,), seqs=16), text(1, 8 * PAGE)
    engine.handle(*(submit(number, [*system, *text(number, 5)], 2) for number in range(1, 6)))
    engine.until(*range(1, 6))

    assert engine.prefilled == len(system) + 5 * 5


def test_a_resumed_request_goes_on_from_what_is_cached():
    engine, prompt = Engine(), text(1, 5 * PAGE)
    answer, _ = engine.ask(1, prompt, tokens=12)
    resumed = submit(2, prompt, emitted=pack_ids(answer[:7]), limits=Limits(max_tokens=12))
    engine.handle(resumed)
    engine.until(2)

    assert engine.output[2] == answer[7:]
    assert engine.results[2].timing.cached_tokens == 4 * PAGE
