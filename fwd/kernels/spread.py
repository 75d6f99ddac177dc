"""Where the bits of narrow numbers stand in a 32-bit word, so that few instructions make bf16 of them (cuda/quant.cuh).

A kernel gets its i-th pair of numbers, those of inputs 2i and 2i + 1, by rotating the word to the left and masking,
then an `or` of what it got; both halves of a word are alike.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


class Spread(NamedTuple):
    """A format's numbers in a word."""

    bits: int  # of a number: 4 or 8
    shift: int  # of all bits but the sign, in the 16 of a bf16
    signed: bool  # the highest bit goes to bit 15
    pairs: tuple[tuple[tuple[int, int], ...], ...]  # of each pair: (rotation to the left, mask), …

    def placed(self, code: int) -> int:
        """Return a number's bits as they stand in 16."""
        if not self.signed:
            return code << self.shift
        top = code >> (self.bits - 1)
        return top << 15 | (code - (top << (self.bits - 1))) << self.shift

    def word(self, codes: list[int]) -> int:
        """Return the word of 32 / bits numbers."""
        word = 0
        for pair, parts in enumerate(self.pairs):
            both = self.placed(codes[2 * pair]) | self.placed(codes[2 * pair + 1]) << 16
            for left, mask in parts:
                word |= _rotated(both & mask, 32 - left)
        return word


E2M1 = Spread(
    4,
    6,
    True,
    (
        ((0, 0x81C081C0),),
        ((6, 0x81C081C0),),
        ((28, 0x81C081C0),),
        ((2, 0x80C080C0), (26, 0x01000100)),
    ),
)
E4M3 = Spread(8, 4, True, (((0, 0x87F087F0),), ((28, 0x87808780), (4, 0x00700070))))
NIBBLE = Spread(4, 0, False, tuple((((32 - 4 * pair) % 32, 0x000F000F),) for pair in range(4)))


def words_of(data: Tensor, spread: Spread) -> Tensor:
    """Return int32 [..]: the words of uint8 [.., 4], numbers in the order of their inputs, the even one lower."""
    low, high = _tables(spread, data.device)
    pairs = data.contiguous().view(torch.int16).int() & 0xFFFF  # [.., 2]
    words = low.index_select(0, pairs[..., 0].flatten())
    words |= high.index_select(0, pairs[..., 1].flatten())
    return words.view(data.shape[:-1])


def bytes_of(words: Tensor, spread: Spread) -> Tensor:
    """Return uint8 [.., 4] of int32 [..]."""
    found = [torch.zeros_like(words) for _ in range(4)]
    for pair, parts in enumerate(spread.pairs):
        both = torch.zeros_like(words)
        for left, mask in parts:
            both |= rotated(words, left) & _signed(mask)
        for half in range(2):
            number = 2 * pair + half
            code = _code(both >> 16 * half, spread)
            found[number * spread.bits // 8] |= code << number * spread.bits % 8
    return torch.stack(found, dim=-1).to(torch.uint8)


def rotated(words: Tensor, left: int) -> Tensor:
    """Return int32 words rotated to the left."""
    if left % 32 == 0:
        return words
    return words << left | (words >> (32 - left)) & ((1 << left) - 1)


def _code(both: Tensor, spread: Spread) -> Tensor:
    rest = (1 << (spread.bits - spread.signed)) - 1
    code = both >> spread.shift & rest
    return code | (both >> 15 & 1) << (spread.bits - 1) if spread.signed else code


@cache
def _tables(spread: Spread, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 [65536] twice: what the first two bytes add to the word, and the last two."""
    count, mask = 8 // spread.bits, (1 << spread.bits) - 1

    def added(place: int, byte: int) -> int:
        codes = [0] * (32 // spread.bits)
        for each in range(count):
            codes[place * count + each] = byte >> each * spread.bits & mask
        return _signed(spread.word(codes))

    bytes_ = torch.tensor([[added(place, byte) for byte in range(256)] for place in range(4)], dtype=torch.int32)
    low, high = (bytes_[place] | bytes_[place + 1].unsqueeze(1) for place in (0, 2))
    return low.flatten().to(device), high.flatten().to(device)


def _rotated(word: int, left: int) -> int:
    left %= 32
    return (word << left | word >> (32 - left)) & WORD


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
