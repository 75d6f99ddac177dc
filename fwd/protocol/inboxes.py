"""Sorts what comes over one client connection by who waits for it."""

from collections import deque
from itertools import count

from fwd.protocol.local import Accepted, FromDaemon, Text
from fwd.protocol.messages import Failed, Finished, PromptLogprobs, Tokens

NOBODY = 0


class Inboxes:
    """Sorts the frames of one connection by their readers: a request has a tag, an ask a negative one.

    A reader may leave early: what still comes for it is dropped, so the answers of others stay theirs.
    """

    def __init__(self) -> None:
        self._tags = count(1)
        self._ask_tags = count(-1, -1)
        self._tag_of: dict[int, int] = {}
        self._asked: deque[int] = deque()
        self._boxes: dict[int, deque[FromDaemon]] = {}

    def open(self) -> int:
        """The tag of a new request."""
        tag = next(self._tags)
        self._boxes[tag] = deque()
        return tag

    def ask(self) -> int:
        """The tag of an admin message that is being sent; these are answered in order."""
        tag = next(self._ask_tags)
        self._boxes[tag] = deque()
        self._asked.append(tag)
        return tag

    def close(self, tag: int) -> int | None:
        """Nobody reads there any more; returns the id of the request if it still runs."""
        self._boxes.pop(tag, None)
        return next((number for number, owner in self._tag_of.items() if owner == tag), None)

    def put(self, message: FromDaemon) -> int | None:
        """Keep a message for its reader; returns the id of a request whose reader left before it had one."""
        box = self._boxes.get(self._route(message))
        if box is not None:
            box.append(message)
        return message.id if box is None and isinstance(message, Accepted) else None

    def get(self, tag: int) -> FromDaemon | None:
        """The next message for that tag."""
        box = self._boxes[tag]
        return box.popleft() if box else None

    def _route(self, message: FromDaemon) -> int:
        match message:
            case Accepted():
                self._tag_of[message.id] = message.tag
                return message.tag
            case Failed(tag=int(tag)):
                self._tag_of = {number: owner for number, owner in self._tag_of.items() if owner != tag}
                return tag
            case Finished() | Failed() if message.id:
                return self._tag_of.pop(message.id, NOBODY)
            case Tokens() | PromptLogprobs() | Text():
                return self._tag_of.get(message.id, NOBODY)
        return self._asked.popleft() if self._asked else NOBODY
