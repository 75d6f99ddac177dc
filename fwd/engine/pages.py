"""KV pages: which cells of the cache belong to which request. Counts only; the tensors live with the model."""

from fwd.engine.request import Request


class PagedSpace:
    """Fixed-size pages behind reserve → commit or roll back → release.

    A request holds whole pages; cells beyond `request.computed` are reserved, not committed. Page numbers are
    0 … `total` − 1, `page_size` is in tokens.
    """

    def __init__(self, total: int, page_size: int) -> None:
        self.total = total
        self.page_size = page_size
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill."""
        return -(-tokens // self.page_size)

    def reserve(self, request: Request, tokens: int) -> bool:
        """Give the request cells for its first `tokens` positions; False, and nothing is changed, if pages lack."""
        missing = self.pages_for(tokens) - len(request.pages)
        if missing > len(self._free):
            return False
        if missing > 0:
            request.pages += [self._free.pop() for _ in range(missing)]
            request.new_pages()
        return True

    def commit(self, request: Request, tokens: int) -> None:
        """The KV of the first `tokens` positions is written and stays."""
        assert self.pages_for(tokens) <= len(request.pages)
        request.advance(tokens)

    def rollback(self, request: Request) -> None:
        """Give back pages that hold no committed token."""
        self._keep(request, self.pages_for(request.computed))

    def release(self, request: Request) -> None:
        """Give back everything."""
        self._keep(request, 0)

    def _keep(self, request: Request, pages: int) -> None:
        self._free += reversed(request.pages[pages:])
        del request.pages[pages:]
        request.new_pages()
