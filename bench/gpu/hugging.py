"""A peer: transformers' generate with a static cache, compiled where it is on a GPU: `python -m gpu.hugging FOLDER …`.

Prints tokens per second of each round as JSON: those of the second half of the answer, since every answer brings a
cache of its own, for which its first steps capture a graph again.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

from fwd.cli.bench.peer import Clock
from gpu.decoder import parser


class Peer:
    """A loaded model and a prompt of random ids."""

    def __init__(self, folder: Path, device: str, context: int) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self._ids = torch.randint(0, self._model.config.vocab_size, (1, context), device=device)

    def tokens_per_s(self, tokens: int) -> float:
        """The rate of one answer of so many tokens."""
        clock = Clock()
        with torch.inference_mode():
            self._model.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
                streamer=clock,
            )
        times = clock.times[1:]
        half = len(times) // 2
        return (len(times) - 1 - half) / (times[-1] - times[half])


def main() -> None:
    """Measure and print; the first two answers compile and do not count."""
    chosen = parser(__doc__).parse_args()
    peer = Peer(chosen.folder, chosen.device, chosen.context)
    found = [peer.tokens_per_s(chosen.tokens) for _ in range(chosen.rounds + 2)]
    json.dump(found[2:], sys.stdout)


if __name__ == "__main__":
    main()
