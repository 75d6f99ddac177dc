"""Chat documents in ChatML: requests for a function, and questions about one, worded from its docstring."""

import re
import zlib
from collections.abc import Iterator

SYSTEM = "You are a helpful assistant that writes Python."
VERBS = frozenset(
    """
    add append apply call check close compare compute convert copy create decode delete determine emit encode
    execute extract find format generate get handle insert install load look make map move open parse perform
    pop print process push put raise read register remove replace report reset return run save search send set
    show sort split start stop store test turn update use validate wait write yield
    """.split()  # noqa: SIM905 -- a word list reads best as words
)
ASK = (
    "Write a {kind} `{name}` that {does}.",
    "Write a Python {kind} that {does}.",
    "Can you write a {kind} called `{name}`? {sentence}.",
    "Implement `{name}`: {sentence}.",
    "Write `{name}` in Python.",
)
EXPLAIN = (
    "What does this {kind} do?\n\n{code}",
    "Explain this code:\n\n{code}",
    "Write a docstring for this {kind}:\n\n{code}",
    "{code}\n\nWhat is this for?",
)
GREETINGS = (
    ("Hello", "Hello! Ask me for a Python function."),
    ("Hi", "Hi! I can write small pieces of Python. What shall I write?"),
    ("Hello!", "Hello! What Python function do you need?"),
    ("Who are you?", "I am the demo model of fwd, a very small model trained on the Python standard library."),
    ("What are you?", "A very small language model that has read the Python standard library, and nothing else."),
    ("What can you do?", "I can write short Python functions, and say what a function does. I am often wrong."),
    ("Thanks", "You are welcome!"),
    ("Thank you!", "You are welcome!"),
)


def turn(role: str, text: str) -> str:
    """One ChatML message."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def dialogue(*texts: str, system: bool = False) -> str:
    """Turns alternate user, assistant; the template of the tokenizer renders the same string."""
    turns = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return (turn("system", SYSTEM) if system else "") + "".join(turns)


def fenced(code: str) -> str:
    """Code as a Markdown block."""
    return f"```python\n{code}```"


def sentence(doc: str) -> str:
    """The first sentence of a docstring on one line, without its full stop."""
    first = re.split(r"\n\s*\n|(?<=[a-z)`'\"])\.(?:\s|$)", doc.strip())[0]
    return " ".join(first.split()).rstrip(".:")


def does(text: str) -> str:
    """`Return the key` becomes `returns the key`; what does not start with a known verb is quoted as a purpose."""
    word, _, rest = text.partition(" ")
    verb = word.lower()
    if verb in VERBS and rest:
        return f"{verb}{'es' if verb.endswith(('s', 'sh', 'ch', 'x')) else 's'} {rest}"
    if rest and verb.endswith("s") and VERBS & {verb[:-1], verb[:-2]}:
        return f"{verb} {rest}"
    return f"does this: {text}"


def answer(doc: str) -> str:
    """A docstring as an answer: whole paragraphs, as many as stay short."""
    paragraphs = re.split(r"\n\s*\n", doc.strip())
    kept = [paragraphs[0]]
    for paragraph in paragraphs[1:]:
        if sum(map(len, kept)) + len(paragraph) > 400:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def pairs(name: str, kind: str, text: str, bare: str, doc: str) -> Iterator[str]:
    """Three dialogues for a function; the wording is chosen by a checksum, so it never changes between runs."""
    first = sentence(doc)
    if not 12 <= len(first) <= 300:
        return
    pick = zlib.crc32(text.encode())
    slots = {"name": name, "kind": kind, "sentence": first, "does": does(first), "code": fenced(bare)}
    asks = [ASK[(pick + i) % len(ASK)].format(**slots) for i in range(2)]
    question = EXPLAIN[pick % len(EXPLAIN)].format(**slots)
    yield dialogue(asks[0], fenced(text), system=pick % 3 == 0)
    yield dialogue(question, answer(doc), system=pick % 5 == 0)
    if pick % 2:
        yield dialogue(asks[1], fenced(bare), "What does it do?", answer(doc))
    else:
        yield dialogue(asks[1], fenced(text))


def greetings(times: int = 24) -> list[str]:
    """A first message is seldom a task: a few plain answers, repeated so that they are learnt."""
    return [dialogue(*pair, system=i % 3 == 0) for i in range(times) for pair in GREETINGS]
