"""Who goes next, by class, when pages are short."""

from mock_runner import FULL

from fwd.engine.request import Request
from fwd.engine.scheduler import Chunk, Scheduler
from fwd.engine.space import Space
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits

PAGE, CHUNK = 16, 64


def space_of(pages):
    return Space((FULL,), (pages,), PAGE, chunk=CHUNK, key=b"")


def request(number, prompt, tokens, priority):
    limits = Limits(max_tokens=tokens)
    made = Request(Submit(id=number, prompt=pack_ids([1] * prompt), limits=limits, seed=1, priority=priority))
    made.clock.arrived = float(number)
    return made


def execute(space, work):
    """Do the work as an engine would; the ids of the requests that were touched."""
    for span in [work] if isinstance(work, Chunk) else work:
        if isinstance(span, Chunk):
            space.commit(span.request, span.end)
            draws = span.request.phase == "decode"
        else:
            draws = span.draws
            space.commit(span.request, span.end)
        if draws:
            span.request.append([5])
    return [work.request.id] if isinstance(work, Chunk) else [span.request.id for span in work]


def test_background_work_that_lacks_a_page_gives_way_to_a_prompt():
    """The background request is the only one that decodes, and takes itself out: the prompt goes on instead."""
    space = space_of(12)
    scheduler = Scheduler(space, 4, CHUNK)
    background, interactive = request(1, 15, 100, "background"), request(2, 170, 2, "interactive")
    scheduler.add(background)
    touched = execute(space, scheduler.next())
    scheduler.add(interactive)
    while interactive.output < 2:
        work = scheduler.next()
        assert work
        touched += execute(space, work)

    assert touched.count(2) == 4
    assert background.length > background.prompt


def test_an_interactive_prompt_goes_before_background_prompts():
    space = space_of(1000)
    scheduler = Scheduler(space, 4, CHUNK)
    scheduler.add(request(1, 6400, 5, "background"))
    execute(space, scheduler.next())
    scheduler.add(request(2, CHUNK, 5, "interactive"))

    assert execute(space, scheduler.next()) == [2]


def drive(scheduler, space, steps):
    for _ in range(steps):
        if work := scheduler.next():
            execute(space, work)


def test_an_interactive_request_takes_the_pages_of_background_work_which_is_replayed_later():
    space = space_of(12)
    scheduler = Scheduler(space, 4, CHUNK)
    background, interactive = request(1, 100, 60, "background"), request(2, 150, 3, "interactive")
    scheduler.add(background)
    drive(scheduler, space, 6)
    drawn = background.output
    scheduler.add(interactive)
    assert execute(space, scheduler.next()) == [2]
    assert not background.placed
    while interactive.output < 3:
        execute(space, scheduler.next())
    scheduler.remove(interactive)
    while background.output < 60:
        execute(space, scheduler.next())

    assert background.output > drawn > 0
    space.check()


def test_an_interactive_request_takes_the_slot_of_the_youngest_background_request():
    space = space_of(100)
    scheduler = Scheduler(space, 2, CHUNK)
    background = [request(number, 10 + number, 50, "background") for number in (1, 2)]
    for each in background:
        scheduler.add(each)
    drive(scheduler, space, 5)
    scheduler.add(request(3, 30, 5, "interactive"))
    scheduler.next()

    assert [each.placed for each in background] == [True, False]


def test_background_work_takes_nothing_from_anybody():
    space = space_of(100)
    scheduler = Scheduler(space, 1, CHUNK)
    first, second = request(1, 10, 5, "interactive"), request(2, 12, 5, "background")
    scheduler.add(first)
    scheduler.add(second)
    drive(scheduler, space, 4)

    assert first.placed
    assert not second.placed
    assert scheduler.waiting == 1


def test_a_prompt_that_waits_costs_a_look_at_the_tree_only_when_something_was_released():
    space = space_of(12)
    scheduler = Scheduler(space, 4, CHUNK)
    scheduler.add(request(1, 100, 60, "interactive"))
    drive(scheduler, space, 3)
    looks, match = [], space.tree.match
    space.tree.match = lambda request: looks.append(request.id) or match(request)
    scheduler.add(request(2, 150, 3, "interactive"))
    drive(scheduler, space, 30)

    assert looks == [2]
