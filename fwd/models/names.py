"""Names of modules as quantisation configs write them: plain, with wildcards, or as regular expressions.

Patterns are a stranger's: their number, length and repetitions are bounded. Where the files of a model are at hand none
is matched at all (see `fwd.models.quantization`). No torch here.
"""

import fnmatch
import re
import warnings
from dataclasses import dataclass, replace
from itertools import accumulate

from fwd.errors import ModelError
from fwd.models.fields import short

_MAX_NAMES, _MAX_PATTERNS, _MAX_LENGTH = 1 << 16, 256, 512
_MAX_REPEATS, _MAX_CHOICES = 6, 16  # in one expression
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")  # what is escaped, or one of a class
_REPEAT = re.compile(r"[*+]|\{\d*,|(?<![*+?}(])\?")
_UNBOUNDED = re.compile(r"\)[*+{]|\(\?P=|\(\?\(")  # a repeated group, a reference to one


@dataclass(frozen=True, slots=True)
class Names:
    """A set of modules."""

    plain: frozenset[str] = frozenset()
    globs: tuple[re.Pattern[str], ...] = ()
    expressions: tuple[re.Pattern[str], ...] = ()

    def and_also(self, name: str) -> "Names":
        """These and one more."""
        return replace(self, plain=self.plain | {name})

    def has(self, module: str) -> bool:
        """Whether the module, one it stands in, or a run of the parts of its name is one of these.

        So `lm_head`, `model.layers.0`, `mlp.gate` and `model.layers.*.self_attn` are all found where they are meant.
        Expressions match from the beginning of the name.
        """
        parts = module.split(".")
        outer = list(accumulate(parts, "{}.{}".format))  # the module and those it stands in
        inner = (run for first in range(len(parts)) for run in accumulate(parts[first:], "{}.{}".format))
        return (
            any(run in self.plain for run in inner)
            or any(glob.match(name) for glob in self.globs for name in outer)
            or any(expression.match(module) for expression in self.expressions)
        )


NO_NAMES = Names()


def parse_names(value: object, where: str) -> Names:
    """Check a config's list of names; `re:` marks expressions, `*` and `?` wildcards. Raises ModelError."""
    if value is None:
        return Names()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(value) > _MAX_NAMES:
        raise ModelError(f"{where} must be a list of up to {_MAX_NAMES} names, found {short(value)}")
    expressions = [name[3:] for name in value if name.startswith("re:")]
    globs = [name for name in value if not name.startswith("re:") and set(name) & set("*?[")]
    if len(expressions) + len(globs) > _MAX_PATTERNS:
        raise ModelError(f"{where} holds {len(expressions) + len(globs)} patterns: {_MAX_PATTERNS} are the most")
    return Names(
        frozenset(value).difference(globs),
        tuple(_compiled(fnmatch.translate(_bounded(glob, where)), where) for glob in globs),
        tuple(_expression(expression, where) for expression in expressions),
    )


def _expression(expression: str, where: str) -> re.Pattern[str]:
    bare = _LITERAL.sub("x", _bounded(expression, where))
    repeats, choices = len(_REPEAT.findall(bare)), bare.count("|")
    if repeats > _MAX_REPEATS or choices > _MAX_CHOICES or _UNBOUNDED.search(bare) or re.search(r"\\[1-9]", expression):
        raise ModelError(f"{where}: {short(expression)} repeats too much to be matched safely")
    return _compiled(expression, where)


def _bounded(pattern: str, where: str) -> str:
    if len(pattern) > _MAX_LENGTH:
        raise ModelError(f"{where}: {short(pattern)} has {len(pattern)} characters: {_MAX_LENGTH} are the most")
    return pattern


def _compiled(expression: str, where: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets that may mean something else one day
            return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ModelError(f"{where}: {short(expression)} is no regular expression: {error}") from None
