"""Names of modules as quantisation configs write them: plain, with wildcards, or as regular expressions.

Patterns are a stranger's: their length is bounded, and expressions that could take long are refused when a module is
looked for. Where the files of a model are at hand none is (see `fwd.models.quantization`). No torch here.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fwd.errors import ModelError
from fwd.models.fields import short

_MAX_NAMES, _MAX_LENGTH = 1 << 16, 1 << 16  # of all patterns together
_MAX_EXPRESSION, _MAX_REPEATS, _MAX_CHOICES = 1024, 6, 64  # of one that is matched
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")  # what is escaped, or one of a class
_REPEAT = re.compile(r"[*+]|\{\d*,|(?<![*+?}(])\?")
_UNBOUNDED = re.compile(r"\)[*+{]|\(\?P=|\(\?\(")  # a repeated group, a reference to one


@dataclass(frozen=True, slots=True)
class Names:
    """A set of modules."""

    plain: frozenset[str] = frozenset()
    globs: tuple[tuple[str, ...], ...] = ()  # what stands between the wildcards
    expressions: tuple[re.Pattern[str], ...] = ()
    refusal: str = ""  # why no module is looked for

    def and_also(self, others: "Names") -> "Names":
        """Return these and others."""
        return Names(
            self.plain | others.plain,
            self.globs + others.globs,
            self.expressions + others.expressions,
            self.refusal or others.refusal,
        )

    def has(self, module: str) -> bool:
        """Whether the module, one it stands in, or a run of the parts of its name is one of these.

        So `lm_head`, `model.layers.0`, `mlp.gate` and `model.layers.*.self_attn` are all found where they are meant.
        Expressions match from the beginning of the name. Raises ModelError for expressions that repeat too much.
        """
        if self.refusal:
            raise ModelError(self.refusal)
        parts = module.split(".")
        outer = list(accumulate(parts, "{}.{}".format))  # the module and those it stands in
        inner = (run for first in range(len(parts)) for run in accumulate(parts[first:], "{}.{}".format))
        return (
            not self.plain.isdisjoint(inner)
            or any(_fits(glob, name) for glob in self.globs for name in outer)
            or any(expression.match(module) for expression in self.expressions)
        )


NO_NAMES = Names()


def _fits(glob: Sequence[str], name: str) -> bool:
    """Whether a name is pieces in order with anything between them."""
    first, *middle, last = glob
    place = len(first) if name.startswith(first) else -1
    for piece in middle:
        place = name.find(piece, place) + len(piece) if place >= 0 and piece in name[place:] else -1
    return 0 <= place <= len(name) - len(last) and name.endswith(last)


def parse_names(value: object, where: str) -> Names:
    """Check a config's list of names; `re:` marks expressions, `*` is a wildcard. Raises ModelError."""
    if value is None:
        return Names()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(value) > _MAX_NAMES:
        raise ModelError(f"{where} must be a list of up to {_MAX_NAMES} names, found {short(value)}")
    expressions = [name[3:] for name in value if name.startswith("re:")]
    globs = [name for name in value if not name.startswith("re:") and "*" in name]
    if (length := sum(map(len, expressions + globs))) > _MAX_LENGTH:
        raise ModelError(f"{where} holds patterns of {length} characters: {_MAX_LENGTH} are the most")
    unbounded = next(filter(_is_unbounded, expressions), None)
    return Names(
        frozenset(value).difference(globs),
        tuple(tuple(glob.split("*")) for glob in globs),
        tuple(_compiled(expression, where) for expression in expressions),
        "" if unbounded is None else f"{where}: {short(unbounded)} repeats too much to be matched safely",
    )


def _is_unbounded(expression: str) -> bool:
    if len(expression) > _MAX_EXPRESSION:
        return True
    bare = _LITERAL.sub("x", expression)
    repeats, choices = len(_REPEAT.findall(bare)), bare.count("|")
    risky = _UNBOUNDED.search(bare) or re.search(r"\\[1-9]", expression)
    return repeats > _MAX_REPEATS or choices > _MAX_CHOICES or risky is not None


def _compiled(expression: str, where: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets that may mean something else one day
            return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ModelError(f"{where}: {short(expression)} is no regular expression: {error}") from None
