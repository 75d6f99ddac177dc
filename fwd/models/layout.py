"""What a model keeps of the tokens it has seen, and what that costs in bytes. No torch here.

Layers that keep the same thing for the same time form a group, which has pages (or records) of its own.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

KVFormat = Literal["float32", "bfloat16", "fp8"]
KV_ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "fp8": 1}
SCALE_BYTES = 4  # fp8: one float32 scale a token and head
LATENT_BLOCK = 128  # as in `fwd.kernels.kv`, which a test holds
STATE_ITEMSIZE = 4  # states are float32


@dataclass(frozen=True, slots=True)
class Paged:
    """One key and one value vector per token, layer and head, in pages.

    With a `window` a row sees that many tokens, itself included, and pages behind it are given back; 0 is all of them.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int = 0

    def token_bytes(self, kv: KVFormat) -> int:
        """Bytes one token takes in all layers."""
        scale = SCALE_BYTES if kv == "fp8" else 0
        return len(self.layers) * self.kv_heads * 2 * (self.head_dim * KV_ITEMSIZE[kv] + scale)


@dataclass(frozen=True, slots=True)
class Latent:
    """One latent and one rotated key per token and layer, shared by all heads (MLA, DeepSeek-V2 2024), in pages.

    In fp8 the latent has a scale for each LATENT_BLOCK numbers, and the rotated key stays bfloat16.
    """

    layers: tuple[int, ...]
    latent: int
    rope: int

    def token_bytes(self, kv: KVFormat) -> int:
        """Bytes one token takes in all layers."""
        if kv == "fp8":
            scales = -(-self.latent // LATENT_BLOCK) * SCALE_BYTES
            return len(self.layers) * (self.latent + scales + self.rope * KV_ITEMSIZE["bfloat16"])
        return len(self.layers) * (self.latent + self.rope) * KV_ITEMSIZE[kv]


@dataclass(frozen=True, slots=True)
class State:
    """A recurrent state of `values` float32 numbers per sequence and layer, whatever the number of tokens."""

    layers: tuple[int, ...]
    values: int

    @property
    def record_bytes(self) -> int:
        """Bytes of the states of all layers of one sequence."""
        return len(self.layers) * self.values * STATE_ITEMSIZE


CacheLayout = Paged | Latent | State
GroupKind = Literal["full", "sliding", "state"]
_KINDS: tuple[GroupKind, ...] = ("full", "sliding", "state")


class Group(NamedTuple):
    """Layouts that share pages: page numbers and block tables are per group. `window` is 0 unless it is sliding."""

    kind: GroupKind
    window: int
    layouts: tuple[CacheLayout, ...]

    def first_seen(self, position: int) -> int:
        """The first token that a row at `position` or later sees."""
        return max(0, position - self.window + 1) if self.window else 0

    def unit_bytes(self, page_size: int, kv: KVFormat) -> int:
        """Bytes of one page, or of one record of a state group."""
        return sum(
            layout.record_bytes if isinstance(layout, State) else page_size * layout.token_bytes(kv)
            for layout in self.layouts
        )


def groups(layouts: tuple[CacheLayout, ...]) -> tuple[Group, ...]:
    """Return the groups of a model: all of a sequence first, then windows from the narrowest, then states."""
    members: dict[tuple[GroupKind, int], list[CacheLayout]] = {}
    for layout in layouts:
        members.setdefault(_key(layout), []).append(layout)
    order = sorted(members, key=lambda key: (_KINDS.index(key[0]), key[1]))
    return tuple(Group(kind, window, tuple(members[kind, window])) for kind, window in order)


def _key(layout: CacheLayout) -> tuple[GroupKind, int]:
    match layout:
        case State():
            return "state", 0
        case Paged(window=window) if window:
            return "sliding", window
    return "full", 0
