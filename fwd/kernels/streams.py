"""Which formats of weights the kernels stream, and what a matrix takes then. No torch here.

`fwd.kernels.packing` makes what is counted here; a test holds both together.
"""

from typing import NamedTuple

GROUP, TILE = 8, 16  # outputs of a group, and whole of which a matrix has
CELL = 128  # inputs that share a scale of FP8 in blocks


class Stream(NamedTuple):
    """A block of a group's outputs."""

    inputs: int
    nbytes: int
    factors: bool = False  # a float32 of each output
    cells: bool = False  # and one of a group's 128 inputs


STREAMS = {
    "bf16": Stream(32, 512),
    "fp8": Stream(64, 512, factors=True, cells=True),
    "mxfp4": Stream(128, 544),
    "nvfp4": Stream(128, 576, factors=True),
    "int4_32": Stream(128, 608),
    "int4_128": Stream(128, 544),
}
HEADS = frozenset({"bf16", "fp8"})  # streams that a head may have


def stream_of(form: str, block: tuple[int, int], inputs: int) -> str:
    """Return the stream of a matrix that is not refused; blocks of 0 inputs have all of them."""
    if form != "int4":
        return form
    return "int4_32" if min(block[1] or inputs, inputs) % 128 or inputs % 128 else "int4_128"


def refusal(form: str, block: tuple[int, int], outputs: int, inputs: int, *, ordered: bool) -> str | None:
    """Return why no kernel takes a matrix in a format, or None; `ordered` is int4 in activation order."""
    height, width = block[0] or outputs, block[1] or inputs
    match form:
        case "fp8" if width < inputs and (width % CELL or (height % GROUP and height < outputs)):
            return f"FP8 in blocks of {height}×{width}, kernels take multiples of {GROUP}×{CELL}"
        case "int4" if ordered:
            return "int4 in activation order"
        case "int4" if min(width, inputs) % 32 or inputs % 32:
            return f"int4 in groups of {min(width, inputs)} of {inputs} inputs, kernels take multiples of 32"
        case "bf16" | "fp8" | "mxfp4" | "nvfp4" | "int4":
            return None
    return f"weights in {form}"


def packed_bytes(stream: str, outputs: int, inputs: int) -> int:
    """Bytes of a packed matrix [outputs, inputs], with what pads it and the floats beside it."""
    known = STREAMS[stream]
    groups = -(-outputs // TILE) * TILE // GROUP
    floats = GROUP * known.factors + -(-inputs // CELL) * known.cells
    return groups * (-(-inputs // known.inputs) * known.nbytes + 4 * floats)
