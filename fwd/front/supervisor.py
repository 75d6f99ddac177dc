"""Up to two engines: the active one, and one that is staged to replace it or retiring after it was replaced."""

import asyncio
from collections.abc import Callable

from fwd.errors import BadRequestError, FwdError
from fwd.front.keeper import Keeper
from fwd.front.streams import Stream
from fwd.protocol.messages import Finished, Load


class Supervisor:
    """Routes streams to engines; `make` builds a keeper for a `Load`."""

    def __init__(self, make: Callable[[Load], Keeper], load: Load) -> None:
        self._make = make
        self.active = make(load)
        self.second: Keeper | None = None
        self._owner: dict[int, Keeper] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> asyncio.Task[None]:
        """Run the active engine; the task ends when it is stopped or cannot be started."""
        return self._run(self.active)

    def stage(self, load: Load) -> Keeper:
        """Start a second engine beside the active one; raises `BadRequestError` while there already is one."""
        if self.second:
            raise BadRequestError("a second engine is already there: wait until the last swap is over")
        self.second = self._make(load)
        self._run(self.second)
        return self.second

    async def promote(self) -> None:
        """Make the staged engine the active one; return when the old one has finished its streams and is gone."""
        assert self.second, "nothing is staged"
        self.active, self.second = self.second, self.active
        await self.second.drained()
        await self.discard()

    async def discard(self) -> None:
        """Stop the engine that is not active."""
        if self.second:
            second, self.second = self.second, None
            await second.stop()

    def submit(self, stream: Stream) -> None:
        """Give a stream to the active engine, which keeps it to its end."""
        self._owner[stream.id] = self.active
        stream.on_end.append(self._ended)
        self.active.submit(stream)

    def cancel(self, stream: Stream, result: Finished | FwdError | None = None) -> None:
        """End an open stream, by default as cancelled; an ended one is left as it is."""
        if owner := self._owner.get(stream.id):
            owner.cancel(stream, result)

    def close(self, stream: Stream, result: Finished) -> None:
        """End an open stream whose answer is complete, with the engine's account of it if that comes."""
        if owner := self._owner.get(stream.id):
            owner.close(stream, result)

    async def stop(self) -> None:
        """Stop all engines."""
        await self.discard()
        await self.active.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, keeper: Keeper) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(keeper.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _ended(self, stream: Stream) -> None:
        self._owner.pop(stream.id, None)
