"""The peer: `transformers` generate, greedy and with its KV cache, on the same weights."""

import time
from pathlib import Path
from typing import Any

ABSENT = "transformers is not installed, so there is no peer: pip install 'fwd[bench]'"


class Peer:
    """A loaded model with the engine's number of threads; raises `ImportError` where transformers is absent."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import torch  # noqa: PLC0415  # seconds
        import transformers  # noqa: PLC0415  # seconds, and optional

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def tokens_per_s(self, prompt: str, tokens: int) -> float:
        """The rate after the first of `tokens` tokens."""
        ids = self._tokenizer(prompt, return_tensors="pt")
        clock = Clock()
        with self._torch.inference_mode():
            self._model.generate(
                **ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, streamer=clock
            )
        _, first, *_, last = clock.times
        return (tokens - 1) / (last - first)


class Clock:
    """A streamer: `put` is called with the prompt, then with each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """Note when."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""
