"""Token ids as the protocol carries them: little-endian int32."""

import sys
from array import array
from collections.abc import Iterable, Sequence

from fwd.errors import BadFrameError

assert sys.byteorder == "little", "fwd runs on little-endian machines"


def pack_ids(ids: Iterable[int]) -> memoryview:
    """Ids as a view of 4 bytes a token; raises `OverflowError` for one that is no int32."""
    return memoryview(array("i", ids)).cast("B")


def unpack_ids(view: memoryview) -> Sequence[int]:
    """The ids in `view`, without a copy; raises `BadFrameError` if it is not whole int32s."""
    if view.nbytes % 4:
        raise BadFrameError(f"{view.nbytes} bytes are no whole number of int32 token ids")
    return view.cast("i")
