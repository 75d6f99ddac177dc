"""Modules with a planted bug: a test of a test."""

import inspect
import types


def mutant(module, *texts):
    """A copy of a module with changes: each old text, which its source holds once, and the new one in turn."""
    source = inspect.getsource(module)
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
        source = source.replace(old, new)
    copy = types.ModuleType(module.__name__)
    exec(compile(source, str(module.__file__), "exec"), copy.__dict__)
    return copy
