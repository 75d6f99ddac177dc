"""Modules with a planted bug: a test of a test."""

import inspect
import types


def mutant(module, old, new):
    """A copy of a module in which `old`, which its source holds once, is `new`."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    copy = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), copy.__dict__)
    return copy
