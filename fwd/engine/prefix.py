"""The prefix tree: pages that a prefill made, found again by what they hold. No torch here.

A radix tree with one edge a page: the hash of a node is blake2b (RFC 7693, 128 bits, keyed) over its parent's hash and
its page of token ids, so that one table of hashes finds every node, and no client can aim at another's.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, takewhile

from fwd.engine.pages import Pool
from fwd.engine.request import Request
from fwd.models.layout import Group
from fwd.protocol.values import CacheMiss

HASH_BYTES = 16
NODE_BYTES = 448  # a node with its hash, its tokens and its entry in the table; measured by a test
EVICTED = 1 << 16  # hashes of evicted pages that are remembered, to say so
COMPARED = 64  # pages with which a new one is compared, to say where it differs
SESSIONS = 64
ID_BYTES = 4


class Node:
    """One page of a known prefix; `units` is its page or record in each group, −1 where it has none.

    `first` is its latest child, and children are linked among themselves: most nodes have one.
    """

    __slots__ = ("after", "before", "first", "hash", "parent", "pins", "resumed", "tokens", "units")

    def __init__(self, parent: "Node | None", digest: bytes, tokens: bytes, groups: int) -> None:
        self.parent = parent
        self.hash = digest
        self.tokens = tokens
        self.units = [-1] * groups
        self.first: Node | None = None
        self.before: Node | None = None
        self.after: Node | None = None
        self.pins = 0
        self.resumed = False

    @property
    def pinned(self) -> bool:
        """A session that is kept longer ends here or below."""
        return self.pins > 0

    def add(self, child: "Node") -> None:
        """Link a new child."""
        child.after, self.first = self.first, child
        if child.after:
            child.after.before = child

    def unlink(self) -> None:
        """Leave the parent."""
        assert self.parent
        if self.before:
            self.before.after = self.after
        else:
            self.parent.first = self.after
        if self.after:
            self.after.before = self.before

    def children(self) -> "Iterator[Node]":
        """The children, the latest first."""
        child = self.first
        while child:
            yield child
            child = child.after

    def path(self) -> "Iterator[Node]":
        """The node and its ancestors without the root, deepest first."""
        node: Node | None = self
        while node and node.parent:
            yield node
            node = node.parent


@dataclass(frozen=True, slots=True)
class Match:
    """The pages of a prompt that need not be computed, and why there are not more."""

    path: Sequence[Node]
    miss: CacheMiss = ""
    differs_at: int = -1


class PrefixTree:
    """Keeps what prefills made, under the pools' reference counts, in `most` pages at most.

    `key` is the secret of the hashes.
    """

    def __init__(
        self, groups: Sequence[Group], pools: Sequence[Pool[Node]], page_size: int, *, chunk: int, key: bytes, most: int
    ) -> None:
        self._groups, self._pools, self._page, self._chunk, self._most = groups, pools, page_size, chunk, most
        self._hash = blake2b(digest_size=HASH_BYTES, key=key)
        self._state = next((index for index, group in enumerate(groups) if group.kind == "state"), -1)
        self._paged = [index for index, group in enumerate(groups) if group.kind != "state"]
        self._partial = [(index, group) for index, group in enumerate(groups) if group.kind != "full"]
        self._roots: dict[str, Node] = {}
        self._nodes: dict[bytes, Node] = {}
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._sessions: OrderedDict[str, Node] = OrderedDict()
        self._pinned = 0
        self._pinnable = pools[0].total // 2 if groups[0].kind == "full" else math.inf
        self.version = 0  # counts what was published

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, request: Request) -> Match:
        """Find the longest prefix of the prompt to go on from; at least one token is left to compute."""
        limit = (request.prompt - 1) // self._page
        root = self._root(request.submit.adapter)
        path = self._walk(root, request, limit)
        usable = self._usable(path)
        if usable < len(path):
            return Match(path[:usable], "window")
        if usable == limit:
            return Match(path)
        miss, differs_at = self._cause(path[-1] if path else root, request, len(path))
        return Match(path, miss, differs_at)

    def publish(self, request: Request) -> None:
        """Keep the whole pages that a request's prefill has made; where there are states, up to a chunk's end only."""
        if not request.submit.cache or (self._state >= 0 and request.computed % self._chunk):
            return
        node, first = request.node, request.published
        if node is None or not self._knows(node):
            node, first = self._root(request.submit.adapter), 0
        for index in range(first, request.computed // self._page):
            node = self._child(node, self._page_of(request, index))
            for group in self._paged:
                self._merge(node, group, request, index)
        if self._state >= 0 and node.units[self._state] < 0:
            self._keep(node, self._state, request.record)
        request.node, request.published = node, request.computed // self._page
        while len(self._nodes) > self._most and any(map(self.evict, range(len(self._groups)))):
            pass  # without a full group, most pages of a path hold nothing any more
        self.version += 1

    def mark_end(self, node: Node) -> None:
        """Requests are likely to go on from here: a retry, or the next turn."""
        window = max(group.window for group in self._groups)
        for near in islice(node.path(), window // self._page + 2 if window else 0):
            near.resumed = True

    def pin(self, session: str, node: Node) -> None:
        """Keep the path to a node longer than others, instead of what the session kept before."""
        if not self._knows(node):
            return
        before = self._sessions.pop(session, None)
        path = list(takewhile(lambda each: each is not before, node.path()))
        self._count(path, 1)
        if before and not (path and path[-1].parent is before) and node is not before:
            self._count(before.path(), -1)
        self._sessions[session] = node
        while self._sessions and (len(self._sessions) > SESSIONS or self._pinned > self._pinnable):
            self._count(self._sessions.popitem(last=False)[1].path(), -1)

    def evict(self, group: int) -> bool:
        """Take back the cached unit of a group that was used least recently; False if there is none."""
        node = self._pools[group].oldest()
        if node is None:
            return False
        if self._groups[group].kind == "full":
            assert not node.first, "a page goes before the pages it follows"
            self._remove(node)
        else:
            self._forget(node, group)
            while node.parent and not node.first and max(node.units) < 0:
                self._remove(node)
                node = node.parent
        return True

    def _root(self, adapter: str) -> Node:
        if adapter not in self._roots:
            digest = self._digest(bytes(HASH_BYTES), adapter.encode())
            self._roots[adapter] = Node(None, digest, b"", len(self._groups))
        return self._roots[adapter]

    def _digest(self, parent: bytes, tokens: bytes) -> bytes:
        state = self._hash.copy()
        state.update(parent + tokens)
        return state.digest()

    def _page_of(self, request: Request, index: int) -> bytes:
        return request.ids[index * self._page : (index + 1) * self._page].tobytes()

    def _walk(self, root: Node, request: Request, limit: int) -> list[Node]:
        """The nodes of the prompt's pages, as far as they are known; the one loop whose speed is a goal."""
        size, find, fresh = self._page * ID_BYTES, self._nodes.get, self._hash.copy
        path: list[Node] = []
        digest = root.hash
        with memoryview(request.ids) as ids, ids.cast("B") as tokens:
            for begin in range(0, limit * size, size):
                state = fresh()
                state.update(digest + tokens[begin : begin + size])
                digest = state.digest()
                node = find(digest)
                if node is None:
                    break
                path.append(node)
        return path

    def _usable(self, path: Sequence[Node]) -> int:
        """Pages of the path after which every group still has what the next row needs."""
        pages = len(path)
        while pages and (hole := self._hole(path, pages)) >= 0:
            pages = hole
        return pages

    def _hole(self, path: Sequence[Node], pages: int) -> int:
        """The last page that a row after so many pages needs of a group that has it no longer; −1: there is none."""
        for index, group in self._partial:
            first = pages - 1 if group.kind == "state" else group.first_seen(pages * self._page) // self._page
            for page in range(pages - 1, first - 1, -1):
                if path[page].units[index] < 0:
                    return page
        return -1

    def _cause(self, node: Node, request: Request, pages: int) -> tuple[CacheMiss, int]:
        """Why the path ends at `node` after so many pages."""
        tokens = self._page_of(request, pages)
        if self._digest(node.hash, tokens) in self._evicted:
            return "evicted", -1
        common = max((_common(tokens, child.tokens) for child in islice(node.children(), COMPARED)), default=-1)
        if common > 0 or (common == 0 and pages):
            return "differs", pages * self._page + common
        others = (root for root in self._roots.values() if root is not node)
        if not pages and any(self._digest(root.hash, tokens) in self._nodes for root in others):
            return "adapter", -1
        return "never_seen", -1

    def _knows(self, node: Node) -> bool:
        """The node is in the tree; where no page of its own holds it there, it may have been evicted meanwhile."""
        return node.parent is None or self._nodes.get(node.hash) is node

    def _child(self, parent: Node, tokens: bytes) -> Node:
        digest = self._digest(parent.hash, tokens)
        node = self._nodes.get(digest)
        if node is None:
            node = self._nodes[digest] = Node(parent, digest, tokens, len(self._groups))
            parent.add(node)
            self._evicted.pop(digest, None)
        return node

    def _merge(self, node: Node, group: int, request: Request, index: int) -> None:
        """Give the tree the request's page, or the request the tree's, which holds the same bits."""
        table, unit = request.tables[group], node.units[group]
        page = table.pages[index]
        if page < 0 or page == unit:
            return
        if unit < 0:
            self._keep(node, group, page)
        else:
            table.replace(index, self._pools[group].share(unit))
            self._pools[group].drop(page)

    def _keep(self, node: Node, group: int, unit: int) -> None:
        node.units[group] = unit
        self._pools[group].keep(unit, node)

    def _forget(self, node: Node, group: int) -> None:
        self._pools[group].forget(node.units[group])
        node.units[group] = -1

    def _remove(self, node: Node) -> None:
        for group, unit in enumerate(node.units):
            if unit >= 0:
                self._forget(node, group)
        node.unlink()
        del self._nodes[node.hash]
        self._evicted[node.hash] = None
        if len(self._evicted) > EVICTED:
            self._evicted.popitem(last=False)

    def _count(self, path: Iterable[Node], step: int) -> None:
        """Count a session in or out on a path, deepest first: pages go before those they follow."""
        for node in path:
            was, node.pins = node.pinned, node.pins + step
            if node.pinned != was:
                self._pinned += step
                for group, unit in enumerate(node.units):
                    if unit >= 0:
                        self._pools[group].move(unit, pinned=node.pinned)


def _common(left: bytes, right: bytes) -> int:
    """How many tokens two pages have in common at their beginning."""
    pairs = zip(memoryview(left).cast("i"), memoryview(right).cast("i"), strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(left) // ID_BYTES)
