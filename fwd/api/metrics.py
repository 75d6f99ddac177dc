"""What `/metrics` tells: `fwd_*` names, and beside them vLLM's where they mean the same."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from fwd import __version__
from fwd.api.drafting import drafting
from fwd.api.exposition import Histogram, Metric, family, value
from fwd.front.service import Service
from fwd.front.streams import Stream
from fwd.protocol.values import CacheMiss, EngineInfo, Timing

TICK = 0.25
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort"}  # vLLM's words


class Metrics:
    """Counts what ended and measures the event loop; a scrape adds the state of the service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._reasons = Counter(dict.fromkeys(REASONS.values(), 0))
        self._errors: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._missed: Counter[str] = Counter(dict.fromkeys(filter(None, get_args(CacheMiss)), 0))
        self._lag = 0.0
        self._first_token = Histogram()
        self._latency = Histogram()
        self._queue = Histogram()
        self._prefill = Histogram()
        self._decode = Histogram()
        service.observers.append(self._ended)

    async def watch_loop(self) -> None:
        """Measure how late the loop wakes; the value decays over some seconds."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            self._lag = max(loop.time() - due, self._lag * 0.9)

    def text(self) -> str:
        """The exposition."""
        labels = {"model_name": self._service.config.served_name}
        lines: list[str] = []
        speculation = drafting(self._service.supervisor.active)
        for metric in (*self._state(), *self._engine(), *speculation, *self._traffic(), *self._times()):
            samples = list(metric.samples)
            for name in filter(None, (metric.name, metric.alias)):
                lines += family(name, metric.kind, metric.text, samples, labels)
        return "\n".join(lines) + "\n"

    def _ended(self, stream: Stream) -> None:
        self._prompt_tokens += len(stream.prompt)
        if stream.error:
            self._errors[stream.error.code] += 1
        elif stream.finished:
            self._reasons[REASONS[stream.finished.reason]] += 1
            self._observe(stream, (stream.ended or stream.created) - stream.created)
            self._account(stream, stream.finished.timing)

    def _account(self, stream: Stream, timing: Timing) -> None:
        self._cached_tokens += timing.cached_tokens
        if timing.cache_miss:
            self._missed[timing.cache_miss] += max(0, len(stream.prompt) - timing.cached_tokens)

    def _observe(self, stream: Stream, seconds: float) -> None:
        self._latency.observe(seconds)
        if stream.first_token:
            self._first_token.observe(stream.first_token - stream.created)
        if stream.finished and stream.finished.timing.steps:
            self._queue.observe(stream.finished.timing.queue_ms / 1000)
            self._prefill.observe(stream.finished.timing.prefill_ms / 1000)
            self._decode.observe(stream.finished.timing.decode_ms / 1000)

    def _state(self) -> Iterator[Metric]:
        status = self._service.status()
        info = status.engine or EngineInfo()
        free, cached = status.pages_free, status.pages_cached
        held = max(0, status.pages_total - free - cached)
        pages = [("", {"state": state}, count) for state, count in (("free", free), ("cached", cached), ("held", held))]
        memory = [("", {"kind": kind}, size) for kind, size in info.memory.items()]
        used = held / status.pages_total if status.pages_total else 0.0
        build = {"version": __version__, "device": info.device, "dtype": info.dtype, "kernel_set": info.kernel_set}
        yield Metric("fwd_build_info", "gauge", "Build and device.", [("", build, 1)])
        yield value("fwd_ready", "gauge", "The engine is ready.", status.state == "ready")
        yield value("fwd_requests_running", "gauge", "Requests in the engine.", status.running, "num_requests_running")
        yield value("fwd_requests_waiting", "gauge", "Requests that wait.", status.waiting, "num_requests_waiting")
        yield value("fwd_queue_tokens", "gauge", "Tokens of requests that have not begun.", status.queue_tokens)
        yield value("fwd_queue_limit_tokens", "gauge", "How many may wait.", status.queue_limit)
        yield value("fwd_kv_usage_ratio", "gauge", "Share of KV pages in use.", used, "kv_cache_usage_perc")
        yield Metric("fwd_pages", "gauge", "KV pages by who holds them.", pages)
        yield Metric("fwd_memory_bytes", "gauge", "Planned memory.", memory)
        yield value("fwd_event_loop_lag_seconds", "gauge", "How late the event loop wakes.", self._lag)

    def _engine(self) -> Iterator[Metric]:
        keeper = self._service.supervisor.active
        restarts = [("", {"cause": cause}, count) for cause, count in keeper.restarts.items()]
        yield Metric("fwd_engine_restarts_total", "counter", "Engine deaths by cause.", restarts)
        yield value("fwd_stream_resumes_total", "counter", "Streams resumed after a death.", keeper.resumes)
        yield value("fwd_engine_steps_total", "counter", "Steps of this engine process.", keeper.pong.steps)
        yield value("fwd_step_host_seconds", "gauge", "Host work between two steps.", keeper.pong.host_us / 1e6)
        yield value("fwd_decode_progress_age_seconds", "gauge", "Time without progress.", keeper.progress_age)

    def _traffic(self) -> Iterator[Metric]:
        open_tokens = sum(len(stream.emitted) - stream.given for stream in self._service.streams)
        made = self._service.tokens_out + open_tokens
        reasons = [("", {"finished_reason": reason}, count) for reason, count in self._reasons.items()]
        errors = [("", {"code": code}, count) for code, count in self._errors.items()]
        missed = [("", {"cause": cause}, count) for cause, count in self._missed.items()]
        shed = [("", {"reason": code}, count) for code, count in self._service.shed.items()]
        yield Metric("fwd_requests_total", "counter", "Ended requests.", reasons, "vllm:request_success_total")
        yield Metric("fwd_request_errors_total", "counter", "Requests that failed.", errors)
        yield value("fwd_prompt_tokens_total", "counter", "Tokens read.", self._prompt_tokens, "prompt_tokens_total")
        yield value("fwd_cached_tokens_total", "counter", "Prompt tokens from the cache.", self._cached_tokens)
        yield Metric("fwd_prefix_miss_tokens_total", "counter", "Prompt tokens not in the cache.", missed)
        yield Metric("fwd_shed_total", "counter", "Requests told to come again.", shed)
        yield value("fwd_generation_tokens_total", "counter", "Tokens made.", made, "generation_tokens_total")

    def _times(self) -> Iterator[Metric]:
        for name, text, histogram in (
            ("time_to_first_token", "From admission to the first token.", self._first_token),
            ("e2e_request_latency", "From admission to the end.", self._latency),
            ("request_queue_time", "Waiting in the engine.", self._queue),
            ("request_prefill_time", "Prefill.", self._prefill),
            ("request_decode_time", "Decode.", self._decode),
        ):
            yield Metric(f"fwd_{name}_seconds", "histogram", text, histogram.samples(), f"vllm:{name}_seconds")
