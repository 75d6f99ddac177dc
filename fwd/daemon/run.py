"""The running daemon: everything after the sockets and the engine process."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Protocol

from aiohttp import web

from fwd.api import app
from fwd.api.context import RUNNING
from fwd.config import Config
from fwd.daemon.sockets import Listeners
from fwd.errors import EngineError, FwdError, ModelError, NotReadyError
from fwd.front.keeper import Keeper
from fwd.front.local import LocalServer
from fwd.front.process import EngineProcess
from fwd.front.prompts import Prompts
from fwd.front.service import Service
from fwd.front.supervisor import Supervisor
from fwd.log import configure
from fwd.protocol.messages import Load
from fwd.text.files import text_hash


class Stops(Protocol):
    """Whether a signal to stop came before there was a loop."""

    heard: bool


def run(config: Config, listeners: Listeners, process: EngineProcess, early: Stops) -> int:
    """Serve on an event loop of its own; the exit code."""
    configure(config.log_level)
    return asyncio.run(Daemon(config, listeners, process, early).run())


class Daemon:
    """Ordered start and stop of the front process."""

    def __init__(self, config: Config, listeners: Listeners, process: EngineProcess, early: Stops) -> None:
        self._config = config
        self._early = early
        self._listeners = listeners
        self._process = process
        self._stops = asyncio.Event()
        self._hurries = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal, a `Stop` message or an engine that cannot be started; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        if self._early.heard:
            self._stops.set()
        service = self._wire()
        runner = await self._listen(service)
        local = LocalServer(service, self._listeners.local)
        try:
            return await self._serve(service)
        finally:
            await self._stop(service, runner, local)

    def _on_signal(self) -> None:
        if self._stops.is_set():
            self._hurries.set()
        self._stops.set()

    def _wire(self) -> Service:
        config = self._config

        def make(load: Load) -> Keeper:
            return Keeper(
                load,
                ping_interval=config.ping_interval,
                hang_timeout=config.hang_timeout,
                load_timeout=config.load_timeout,
            )

        supervisor = Supervisor(make, _load_message(config))
        supervisor.active.adopt(self._process)
        service = Service(config, supervisor)
        service.listening = self._listeners.names()
        service.stop = self._stops.set
        return service

    async def _listen(self, service: Service) -> web.AppRunner:
        runner = web.AppRunner(app.build(service), **app.RUNNER)
        await runner.setup()
        for sock in self._listeners.http:
            await web.SockSite(runner, sock).start()
        return runner

    async def _serve(self, service: Service) -> int:
        engine = service.supervisor.start()
        stopped = asyncio.get_running_loop().create_task(self._stops.wait())
        await self._load_text(service)
        await asyncio.wait([engine, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not self._stops.is_set():
            raise service.supervisor.active.error or EngineError("the engine ended")
        return 0

    async def _load_text(self, service: Service) -> None:
        try:
            service.prompts = await asyncio.to_thread(Prompts.load, self._config.folder)
        except FwdError:
            raise
        except Exception as error:
            raise ModelError(f"{self._config.folder}: the tokenizer cannot be read: {error}") from error

    async def _stop(self, service: Service, runner: web.AppRunner, local: LocalServer) -> None:
        service.draining = True
        self._listeners.remove_files()
        local.close_listener()
        for site in list(runner.sites):
            await site.stop()
        await self._in_time(self._finish(service, runner, local))
        for stream in list(service.streams):
            service.supervisor.cancel(stream, NotReadyError("the daemon was stopped before the answer was finished"))
        await runner.cleanup()
        await service.supervisor.stop()
        service.close()
        local.close()

    async def _finish(self, service: Service, runner: web.AppRunner, local: LocalServer) -> None:
        """Let open streams end, and their readers have all of them."""
        await service.supervisor.active.drained()
        await runner.app[RUNNING].drained()
        await local.drained()

    async def _in_time(self, work: Coroutine[None, None, None]) -> None:
        """Give `work` `stop_timeout` seconds, or until a second signal."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(work), loop.create_task(self._hurry())]
        await asyncio.wait(tasks, timeout=self._config.stop_timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _hurry(self) -> None:
        await self._hurries.wait()


def _load_message(config: Config) -> Load:
    """What the engine is told to load."""
    return Load(
        model=str(config.folder.resolve()),
        device=config.device,
        dtype=config.dtype,
        context=config.context,
        max_seqs=config.max_seqs,
        kv_dtype=config.kv_dtype,
        kv_bytes=config.kv_bytes,
        threads=config.threads,
        state_dir=str(config.state_path.resolve()) if config.state_path else "",
        log_level=config.log_level,
        strict=config.strict,
        requant=config.requant,
        draft_model=config.drafter,
        text_hash=text_hash(config.folder),
        corpus_bytes=config.draft_log_bytes,
    )
