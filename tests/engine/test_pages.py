"""Pages are neither lost nor given twice, whatever is reserved, committed, rolled back and released."""

from hypothesis import given
from hypothesis import strategies as st

from fwd.engine.pages import PagedSpace
from fwd.engine.request import Request
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Limits, Submit

PAGE = 4
ACTIONS = st.tuples(
    st.sampled_from(["reserve", "commit", "rollback", "release"]), st.integers(0, 3), st.integers(1, 60)
)


def request(number):
    return Request(Submit(id=number, prompt=pack_ids([0] * 60), limits=Limits(max_tokens=1), seed=0))


@given(total=st.integers(1, 20), actions=st.lists(ACTIONS, max_size=60))
def test_free_and_held_are_all_pages(total, actions):
    space, requests = PagedSpace(total, PAGE), [request(number) for number in range(4)]
    for action, index, tokens in actions:
        chosen = requests[index]
        held, version = len(chosen.pages), chosen.pages_version
        match action:
            case "reserve":
                fits = space.pages_for(tokens) - held <= space.free
                assert space.reserve(chosen, tokens) == fits
                assert len(chosen.pages) == (max(held, space.pages_for(tokens)) if fits else held)
            case "commit" if tokens <= held * PAGE:
                space.commit(chosen, tokens)
            case "rollback":
                space.rollback(chosen)
                assert len(chosen.pages) == min(held, space.pages_for(chosen.computed))
            case "release":
                space.release(chosen)
                chosen.restart()
                assert chosen.pages == []
        assert held == len(chosen.pages) or version != chosen.pages_version

        pages = [page for each in requests for page in each.pages]
        assert sorted(pages) == sorted(set(pages))
        assert len(pages) + space.free == total
