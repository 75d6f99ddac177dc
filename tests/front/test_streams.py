"""The journal: cursors see every token once and in order, and the engine cannot break its order unnoticed."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import stream

from fwd.errors import DeadlineError, PoisonedError
from fwd.front.streams import JournalError
from fwd.protocol.ids import pack_ids, unpack_ids
from fwd.protocol.messages import Finished, PromptLogprobs, Tokens
from fwd.protocol.values import Sampling, TopLogprobs


def tokens(start, *ids, **fields):
    return Tokens(id=1, start=start, ids=list(ids), **fields)


async def read(journal, cursor=0, step=1000):
    """All a reader with this cursor sees, at most `step` tokens at a time."""
    seen = []
    while not (journal.done and cursor == len(journal.emitted)):
        await journal.wait(cursor)
        piece = journal.emitted[cursor : cursor + step].tolist()
        cursor += len(piece)
        seen += piece
    return seen


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), max_size=8), st.data())
def test_every_cursor_sees_everything_after_it_once(frames, data):
    whole = [token for frame in frames for token in frame]
    late = data.draw(st.integers(0, len(frames)))
    cursor = data.draw(st.integers(0, sum(map(len, frames[:late]))))

    async def main():
        journal = stream(1)
        readers = [asyncio.create_task(read(journal, 0, step)) for step in (1, 2, 1000)]
        begin = 0
        for number, frame in enumerate(frames):
            if number == late:
                readers.append(asyncio.create_task(read(journal, cursor)))
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
            journal.append(tokens(begin, *frame))
            begin += len(frame)
        journal.end(Finished(id=1, reason="stop"))
        return await asyncio.gather(*readers), await read(journal, cursor)

    seen, again = asyncio.run(main())
    assert seen[:3] == [whole] * 3
    assert again == whole[cursor:]
    assert all(piece == whole[cursor:] for piece in seen[3:])


def test_a_reader_that_goes_away_disturbs_nobody(run):
    async def main():
        journal = stream(1)
        gone, stays = (asyncio.create_task(read(journal)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        journal.append(tokens(0, 5))
        journal.end(Finished(id=1, reason="length"))
        assert await stays == [5]
        assert gone.cancelled()

    run(main())


@pytest.mark.parametrize("start", [0, 1, 3, 4, 100])
def test_a_gap_or_a_double_is_noticed_and_not_journaled(start):
    journal = stream(1)
    journal.append(tokens(0, 7, 8))
    with pytest.raises(JournalError, match=f"token {start} came where 2 was due"):
        journal.append(tokens(start, 9))
    assert journal.emitted.tolist() == [7, 8]


def test_tokens_without_the_log_probabilities_asked_for():
    journal = stream(1, sampling=Sampling(logprobs=0))
    with pytest.raises(JournalError, match="2 tokens, 1 log"):
        journal.append(tokens(0, 7, 8, logprobs=[-1.0]))
    assert not journal.emitted


def test_prompt_scores_that_come_again_are_dropped_and_gaps_noticed():
    journal = stream(1, range(10))
    score = [-float(place) for place in range(10)]
    top = [TopLogprobs(ids=(place,)) for place in range(10)]
    for begin, end in ((1, 4), (1, 3), (2, 7), (5, 10)):
        journal.append_prompt(PromptLogprobs(id=1, start=begin, logprobs=score[begin:end], top=top[begin:end]))
    assert journal.prompt_logprobs.tolist() == score[1:]
    assert journal.prompt_top == top[1:]
    with pytest.raises(JournalError, match="gap"):
        journal.append_prompt(PromptLogprobs(id=1, start=11, logprobs=[0.0]))


def test_the_first_end_counts_and_nothing_comes_after_it():
    journal, ends = stream(1), []
    journal.on_end.append(ends.append)
    journal.append(tokens(0, 7))
    journal.end(DeadlineError("late"))
    journal.end(Finished(id=1, reason="stop"))
    journal.append(tokens(1, 8))
    journal.append(tokens(9, 9))
    assert ends == [journal]
    assert journal.error.code == "deadline_exceeded"
    assert journal.finished is None
    assert journal.emitted.tolist() == [7]


def test_what_a_new_engine_is_given():
    journal = stream(1, emitted=pack_ids([4, 5]))
    journal.append(tokens(2, 6))
    first = journal.resubmit()
    journal.append(tokens(3, 7))
    assert list(unpack_ids(first.emitted)) == [4, 5, 6]
    assert list(unpack_ids(journal.resubmit().emitted)) == [4, 5, 6, 7]
    assert (first.prompt, first.seed, first.limits) == (journal.submit.prompt, journal.seed, journal.submit.limits)
    assert journal.given == 2


def test_a_token_clears_a_stream_of_suspicion():
    journal = stream(1)
    journal.stalls = 2
    journal.append(tokens(0, 1))
    assert journal.stalls == 0


def test_an_error_wakes_its_readers(run):
    async def main():
        journal = stream(1)
        reader = asyncio.create_task(journal.wait(0))
        await asyncio.sleep(0)
        journal.end(PoisonedError("gone"))
        await reader

    run(main())
