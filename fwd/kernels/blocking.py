"""How the scales of matrices that are fused into one get a block in common. No torch here."""

from collections.abc import Sequence
from itertools import accumulate
from math import gcd


def common_rows(blocks: Sequence[int], heights: Sequence[int]) -> int:
    """Rows of the largest block that divides the blocks of all parts and begins where each part begins.

    Parts of `heights` rows stand one above the other. A block that covers its part ends with it: only where the next
    part begins matters. One part keeps its block.
    """
    if len(blocks) == 1:
        return blocks[0]
    inner = [block for block, height in zip(blocks, heights, strict=True) if block < height]
    return gcd(*inner, *accumulate(heights[:-1]))
