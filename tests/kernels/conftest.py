"""Fixtures of the kernels' tests, which run on the CPU, and on a GPU with `-m gpu`."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from execution import Execution, absent

from fwd.kernels.gxx import sanitizer_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def execution(request, tmp_path) -> Execution:
    """What kernels of this test are launched by."""
    if request.param == "cuda" and (reason := absent()):
        pytest.skip(reason)
    return Execution(request.param, tmp_path)


@pytest.fixture
def sanitized() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a Python script under the address and undefined-behaviour sanitizers; its launchers say `sanitize=True`.

    At the first report it ends with 99 if `halt`. A clean run ends with 0 and an empty stderr.
    """

    def run(script: str, *, halt: bool = True) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT / "tests/kernels"), str(ROOT / "tests"), str(ROOT)]
        before = f"import sys; sys.path[:0] = {paths!r}\n"
        return subprocess.run(
            [sys.executable, "-c", before + textwrap.dedent(script)],
            env=sanitizer_environment(halt=halt),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
            cwd=ROOT,
        )

    return run
