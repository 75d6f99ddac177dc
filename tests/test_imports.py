"""Imports go one way (DESIGN §3), the front half is light, and nothing in `fwd` can run code that came as data."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "fwd").rglob("*.py"))
BASE = {"fwd", "errors", "config", "log"}
ROOMS = {
    "cli": {"daemon", "api", "front", "text", "protocol"},
    "daemon": {"api", "front", "text", "protocol"},
    "grammar": {"protocol"},
    "api": {"front", "text", "protocol"},
    "front": {"text", "grammar", "protocol"},
    "text": set(),
    "protocol": set(),
    "engine": {"models", "kernels", "grammar", "protocol"},
    "models": {"kernels"},
    "kernels": set(),
    "demo": {"engine", "models", "kernels", "text"},
    "config": set(),
    "errors": set(),
    "log": set(),
    "fwd": {"protocol"},
    "__main__": {"cli"},
}
LAZY = {"cli": {"engine", "models", "kernels", "demo"}}
FRONT = {"cli", "daemon", "api", "front", "text", "grammar", "protocol", "config", "errors", "log", "fwd"}
DEVICE = {"torch", "cupy", "triton", "cuda"}
NO_TORCH = {
    f"engine/{name}"
    for name in ("request", "scheduler", "pages", "prefix", "plan", "ceilings", "drafting", "workspaces")
}
NO_TORCH |= {f"engine/speculate/{name}" for name in ("drafter", "items", "verify")}
NO_TORCH |= {f"engine/speculate/{name}" for name in ("costs", "estimates", "controller", "purse", "accounts")}
NO_TORCH |= {f"engine/speculate/{name}" for name in ("tally", "speculator")}
NO_TORCH |= {"engine/reports", "engine/grammar", "engine/watch", "engine/speculate/forced"}
NO_TORCH |= {f"engine/speculate/{name}" for name in ("grams", "suffix", "corpus", "draft_log")}
NO_TORCH |= {"models/config", "models/architectures", "models/positions", "models/fields"}
NO_TORCH |= {"models/safetensors", "models/spec", "models/quantization", "models/layout"}
NO_TORCH |= {f"models/draft/{name}" for name in ("spec", "config", "body", "costs", "tensors", "tokens")}
NO_TORCH |= {f"models/draft/{name}_config" for name in ("dflash", "eagle", "mtp")}
NO_TORCH |= {"models/names", "models/schemes", "kernels/blocking", "kernels/sizes", "kernels/streams"}
CODE_AS_DATA = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
TRAINER = ROOT / "fwd/demo/train.py"  # its own checkpoints, which it loads with weights_only=True


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The folder (or top-level module) of a module of `fwd`."""
    parts = module.split(".")
    return parts[1] if parts[1:] else "fwd"


def imports(tree: ast.AST, *, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported module and whether the import is inside a function; those for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), lazy=lazy)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", lazy) for alias in node.names)
        else:
            yield from imports(node, lazy=lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def modules() -> set[str]:
    return {name_of(file) for file in FILES}


def resolved(target: str, known: set[str]) -> str:
    """`fwd.errors.FwdError` → `fwd.errors`: the module a name is imported from."""
    return target if target in known else target.rpartition(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    room = room_of(name_of(file))
    assert room in ROOMS, f"{room} has no row in the table"
    for target, lazy in imports(parsed(file)):
        if target.split(".")[0] != "fwd":
            continue
        other = room_of(resolved(target, modules()))
        allowed = {room} | BASE | ROOMS[room] | (LAZY.get(room, set()) if lazy else set())
        assert other in allowed, f"{file.relative_to(ROOT)} imports {target}: {room} may not know {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_light_imports_no_device_library(file):
    room = room_of(name_of(file))
    if room not in FRONT and str(file.relative_to(ROOT / "fwd").with_suffix("")) not in NO_TORCH:
        return
    for target, lazy in imports(parsed(file)):
        assert target.split(".")[0] not in DEVICE or (lazy and room == "cli")


def test_there_are_no_cycles():
    known = modules()
    graph = {
        name_of(file): {
            resolved(target, known) for target, lazy in imports(parsed(file)) if target.startswith("fwd") and not lazy
        }
        - {name_of(file)}
        for file in FILES
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) >= known


def test_the_front_half_loads_without_a_device_library():
    script = "import sys, fwd.daemon.main, fwd.api.app, fwd.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert not set(loaded.stdout.split()) & (DEVICE | {"transformers", "numpy"})


def test_a_front_that_starts_loads_next_to_nothing():
    script = "import sys, fwd.daemon.main; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert not set(loaded.stdout.split()) & {"aiohttp", "jinja2", "tokenizers", "structlog"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_runs_code_that_came_as_data(file):
    tree = parsed(file)
    assert not {target.split(".")[0] for target, _ in imports(tree)} & CODE_AS_DATA
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{file}:{node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("torch.load", "jit.load")):
            assert file == TRAINER, f"{file}:{node.lineno}"
            assert "weights_only=True" in ast.unparse(node)
        if isinstance(node, ast.keyword | ast.Name):
            name = node.arg if isinstance(node, ast.keyword) else node.id
            assert name != "trust_remote_code", f"{file}: code of a model folder is never run"
