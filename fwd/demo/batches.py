"""Documents as arrays of token ids, and batches drawn from them."""

from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer

from fwd.demo import tokenizer
from fwd.demo.corpus import Documents, documents

# Share of the rows of a batch. Modules are read at any offset; pieces and chats from the start of a document.
SHARES = {"code": 0.52, "tests": 0.15, "pieces": 0.10, "chat": 0.23}
ALIGNED = {"pieces", "chat"}
# Places in each piece where a prompt might have ended: the parts are tokenized apart, so that `def ` can be continued.
CUTS = {"pieces": 2}
Array = np.ndarray[Any, Any]


class Pool:
    """Documents of one kind, each followed by END, in one array."""

    def __init__(self, ids: Array, starts: Array) -> None:
        self.ids, self.starts = ids, starts

    @classmethod
    def encode(cls, tok: Tokenizer, texts: list[str], seed: int = 0, cuts: int = 0) -> Self:
        """Tokenize the documents, shuffled; cuts is the number of places where a text is cut."""
        rng = np.random.default_rng(seed)
        parts = [cut(texts[i], rng, cuts) for i in rng.permutation(len(texts))]
        encoded = iter(tok.encode_batch(list(chain.from_iterable(parts)), add_special_tokens=False))
        end = tok.token_to_id(tokenizer.END)
        rows = [[*chain.from_iterable(e.ids for e in islice(encoded, len(part))), end] for part in parts]
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return cls(np.concatenate([np.array(row, dtype=np.uint16) for row in rows]), starts)

    def row(self, rng: np.random.Generator, length: int, aligned: bool) -> Array:
        """Length ids from the start of a document, or from anywhere."""
        last = len(self.ids) - length
        at = rng.choice(self.starts) if aligned else rng.integers(last)
        return self.ids[min(at, last) :][:length]


Pools = dict[str, Pool]


def cut(text: str, rng: np.random.Generator, cuts: int) -> list[str]:
    """The text in cuts + 1 parts, each but the last ending in something that is not a letter or digit."""
    ends = [i for i, c in enumerate(text[:-1], 1) if not c.isalnum()] if cuts else []
    chosen = sorted({0, len(text), *rng.choice(ends, cuts).tolist()}) if ends else [0, len(text)]
    return [text[a:b] for a, b in pairwise(chosen)]


def load(folder: Path, seed: int) -> Pools:
    """The training pools, from the folder's cache when it has one; else they and tokenizer.json are made there."""
    cache = folder / "pools.npz"
    if cache.exists():
        arrays = np.load(cache)
        return {name: Pool(arrays[name], arrays[f"{name}_starts"]) for name in SHARES}
    docs = documents(wanted=False)
    chats = [text.replace(tokenizer.START, "").replace(tokenizer.STOP, "") for text in docs.chat]
    tok = tokenizer.train(docs.code + chats + docs.tests[::8])
    tok.save(str(folder / "tokenizer.json"))
    pools = {name: Pool.encode(tok, texts, seed, CUTS.get(name, 0)) for name, texts in docs._asdict().items()}
    parts: dict[str, Any] = {name: pool.ids for name, pool in pools.items()}
    parts |= {f"{name}_starts": pool.starts for name, pool in pools.items()}
    np.savez(cache, **parts)
    return pools


def held_out(tok: Tokenizer) -> tuple[Documents, Pools]:
    """The held-out documents, and the same as pools."""
    docs = documents(wanted=True)
    return docs, {name: Pool.encode(tok, texts) for name, texts in docs._asdict().items()}


def draw(pools: Pools, rng: np.random.Generator, rows: int, length: int) -> torch.Tensor:
    """One batch, [rows, length + 1]: inputs and targets overlap."""
    kinds = rng.choice(list(SHARES), size=rows, p=list(SHARES.values()))
    batch = [pools[kind].row(rng, length + 1, kind in ALIGNED) for kind in kinds]
    return torch.from_numpy(np.stack(batch).astype(np.int64))
