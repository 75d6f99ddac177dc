"""The cache of all sequences: match or reserve → prepare → commit or roll back → release, for every cache layout."""

import sys
from collections.abc import Iterable, Sequence

from fwd.engine.pages import BlockTable, Copy, Pool
from fwd.engine.prefix import Node, PrefixTree
from fwd.engine.request import Request
from fwd.models.layout import Group


class Space:
    """Pools of one model's groups (`units[g]` pages or records) and the prefix tree over them.

    A request that is placed holds a block table per paged group and, where the model has states, the record of its
    state. Cells beyond `request.computed` are reserved, not committed. Pages of a full group are what admission counts;
    sliding and state groups have enough for every sequence by their size. `page_size` and `chunk` are in tokens, `key`
    is the secret of the prefix tree's hashes, and `nodes` the pages it may know at most.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        units: Sequence[int],
        page_size: int,
        *,
        chunk: int,
        key: bytes,
        nodes: int = sys.maxsize,
    ) -> None:
        assert chunk % page_size == 0
        self.groups, self.page_size, self._chunk = groups, page_size, chunk
        self.pools: list[Pool[Node]] = [Pool(total) for total in units]
        self.tree = PrefixTree(groups, self.pools, page_size, chunk=chunk, key=key, most=nodes)
        self._copies: list[Copy] = []
        self._paged = [index for index, group in enumerate(groups) if group.kind != "state"]
        self._full = [index for index in self._paged if groups[index].kind == "full"]
        self._state = next((index for index, group in enumerate(groups) if group.kind == "state"), -1)

    @property
    def grain(self) -> int:
        """What the prefix tree keeps comes in pieces of so many tokens: pages, or chunks where there are states."""
        return self.page_size if self._state < 0 else self._chunk

    @property
    def main(self) -> Pool[Node]:
        """The pool whose numbers are told to users: the first group's."""
        return self.pools[0]

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill."""
        return -(-tokens // self.page_size)

    def admit(self, request: Request, tokens: int) -> bool:
        """Place a request: share the known prefix of its prompt and reserve its first `tokens` positions.

        False, and nothing is changed, if pages lack; `request.needs` says how many must be available.
        """
        available = self.main.available
        request.tables = tuple(BlockTable() for _ in self._paged)
        request.placed = True
        request.fresh_at = self.tree.version
        if request.submit.prompt_logprobs < 0:
            self._adopt(request)
        if self._reserve(request, tokens, self._full):
            return True
        lacking = self.pages_for(tokens) - len(request.tables[0]) - self.main.available
        self.release(request)
        request.needs = available + lacking
        return False

    def could_place(self, request: Request, victims: Iterable[Request]) -> bool:
        """There could be pages enough for a request that was refused, if the victims gave theirs."""
        held = sum(len(victim.tables[0]) for victim in victims if victim.placed and self._full)
        return self.main.available + held >= request.needs

    def refresh(self, request: Request) -> None:
        """Place a request anew that has computed nothing yet, where others published something since it was placed."""
        if request.fresh_at not in {-1, self.tree.version}:
            reserved = len(request.tables[0]) * self.page_size if self._full else 0
            self.release(request)
            placed = self.admit(request, reserved)
            assert placed, "it held as many pages before"

    def prepare(self, request: Request, end: int) -> bool:
        """Make everything ready for a launch that computes positions `computed` … `end` − 1; False if units lack."""
        for group in self._paged:
            if self.groups[group].kind == "sliding":
                self._slide(request, group)
        return (
            self._reserve(request, end, self._paged) and self._own_tail(request) and self._stage_records(request, end)
        )

    def commit(self, request: Request, end: int, ahead: int = 0) -> None:
        """The rows of the launch up to position `end` stay; `ahead` rows that follow them are launched already."""
        if self._state >= 0:
            self._keep_record(request, end, ahead)
        request.fresh_at, request.begun = -1, True
        request.advance(end)

    def spare(self, request: Request, most: int) -> int:
        """Reserve pages for up to `most` positions after the known ones, as far as there are any: for how many.

        They are kept until the request is released or `rollback` takes them.
        """
        while most > 0 and not self._reserve(request, request.length + most, self._paged):
            most -= 1
        return max(0, most)

    def rollback(self, request: Request) -> bool:
        """Give back the pages beyond the next token, which only drafts could use; False if there are none."""
        kept = self.pages_for(min(request.length + 1, request.limit))
        cut = [list(request.tables[group].cut(kept)) for group in self._paged]
        for group, pages in zip(self._paged, cut, strict=True):
            self._drop(group, pages)
        return any(cut)

    def publish(self, request: Request) -> None:
        """Let others find what the request's prefill has made."""
        self.tree.publish(request)
        if request.computed // self.grain == request.prompt // self.grain:
            self.pin(request)
            if request.node:
                self.tree.mark_end(request.node)

    def pin(self, request: Request) -> None:
        """Keep what is known of the request's session longer than others."""
        if request.submit.cache and request.submit.cache_key and request.node:
            self.tree.pin(request.submit.cache_key, request.node)

    def fork(self, leader: Request, request: Request) -> None:
        """Place a request that waited for the leader's prompt, all of which is computed: share all of it."""
        request.leader, request.placed = None, True
        request.tables = tuple(BlockTable() for _ in self._paged)
        for group in self._paged:
            source, table, pool = leader.tables[group], request.tables[group], self.pools[group]
            table.pages.extend(source.pages[: self.pages_for(leader.prompt)])
            table.behind = source.behind
            for page in table.pages[table.behind :]:
                pool.share(page)
        if self._state >= 0:
            request.record = self.pools[self._state].share(leader.record)
        request.node, request.published = leader.node, leader.published
        request.advance(leader.prompt)
        request.found(leader.prompt, "", -1)
        request.begun = True
        self.pin(request)

    def release(self, request: Request) -> None:
        """Give back everything; nothing of the request is computed any more."""
        for group in self._paged:
            self._drop(group, request.tables[group].cut(0))
        if self._state >= 0:
            self._drop(self._state, [*request.staged, *([request.record] if request.record >= 0 else [])])
        request.displace()

    def take_copies(self) -> list[Copy]:
        """The copies that must be made before the next launch, in order."""
        copies, self._copies = self._copies, []
        return copies

    def check(self) -> None:
        """Assert that nothing is lost and no count is negative; for tests."""
        for pool in self.pools:
            pool.check()

    def _adopt(self, request: Request) -> None:
        """Share the pages of the longest known prefix."""
        match = self.tree.match(request)
        tokens = len(match.path) * self.page_size
        if match.path:
            for group in self._paged:
                self._adopt_pages(request, group, match.path)
            if self._state >= 0:
                request.record = self.pools[self._state].share(match.path[-1].units[self._state])
            request.node, request.published = match.path[-1], len(match.path)
            request.advance(tokens)
        request.found(tokens, match.miss, match.differs_at)

    def _adopt_pages(self, request: Request, group: int, path: Sequence[Node]) -> None:
        table, share = request.tables[group], self.pools[group].share
        first = self._first_seen(group, len(path) * self.page_size)
        table.pages.extend([-1] * first)
        table.behind = first
        table.pages.extend([share(node.units[group]) for node in path[first:]])
        if first:
            for node in path[first:]:
                node.resumed = True

    def _first_seen(self, group: int, position: int) -> int:
        """The first page that a row at `position` or later needs."""
        return self.groups[group].first_seen(position) // self.page_size

    def _slide(self, request: Request, group: int) -> None:
        """Give back the pages that are behind the window of every row to come."""
        for page in request.tables[group].slide(self._first_seen(group, request.computed)):
            self.pools[group].drop(page, behind=True)

    def _reserve(self, request: Request, end: int, groups: Sequence[int]) -> bool:
        for group in groups:
            table, pool = request.tables[group], self.pools[group]
            missing = self.pages_for(end) - len(table)
            if missing > pool.available:
                return False
            table.pages.extend([self._take(group) for _ in range(missing)])
        return True

    def _own_tail(self, request: Request) -> bool:
        """Copy the page that the next position is written to if others hold it as well."""
        index, offset = divmod(request.computed, self.page_size)
        if not offset:
            return True
        for group in self._paged:
            table, pool = request.tables[group], self.pools[group]
            page = table.pages[index]
            if pool.is_shared(page):
                if not pool.available:
                    return False
                table.replace(index, self._take(group))
                self._copies.append(Copy(group, page, table.pages[index]))
                pool.drop(page)
        return True

    def _stage_records(self, request: Request, end: int) -> bool:
        """A record for each row that may be the last to stay; a prefill chunk leaves one."""
        if self._state < 0:
            return True
        wanted = 1 if request.phase == "prefill" else end - request.computed
        missing = wanted - len(request.staged)
        if missing > self.pools[self._state].available:
            return False
        request.staged += [self._take(self._state) for _ in range(missing)]
        return True

    def _keep_record(self, request: Request, end: int, ahead: int) -> None:
        last = 0 if request.phase == "prefill" else end - request.computed - 1
        *before, kept = request.staged[: last + 1]
        following = request.staged[last + 1 :]
        current = [request.record] if request.record >= 0 else []
        self._drop(self._state, [*current, *before, *following[ahead:]])
        request.record, request.staged = kept, following[:ahead]

    def _take(self, group: int) -> int:
        pool = self.pools[group]
        if not pool.free:
            evicted = self.tree.evict(group)
            assert evicted, "available units were counted before"
        return pool.take()

    def _drop(self, group: int, units: Iterable[int]) -> None:
        for unit in units:
            self.pools[group].drop(unit)
