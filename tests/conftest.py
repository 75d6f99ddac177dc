"""What all tests share: a runner for coroutines."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning workers stall beside other processes
settings.register_profile("fwd", deadline=None)  # no test is decided by a timing
settings.load_profile("fwd")


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a coroutine on a loop of its own; nothing may be left undone for a minute, no error unheard."""

    def runner(work: Coroutine[Any, Any, None]) -> None:
        unheard: list[dict[str, Any]] = []

        async def timed() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
            async with asyncio.timeout(60):
                await work

        asyncio.run(timed())
        assert not unheard

    return runner


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end together."""
    items.sort(key=lambda item: "promises" not in item.path.parts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as `measured`, from whichever process they ran in."""
    for report in terminalreporter.getreports("passed"):
        for name, line in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(line)
