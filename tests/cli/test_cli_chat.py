"""`fwd chat`: history, Ctrl-C, the end of the input, a terminal."""

import json
import os
import pty
import select
import signal
import subprocess

import pytest
from apiserver import script
from launch import daemon, launch

from fwd.protocol.requests import prompt_message


@pytest.fixture(scope="module")
def polite(folder):
    """A daemon that always answers `Hello`."""
    with daemon(script("Hello", eos_at=5), folder) as running:
        yield running


@pytest.fixture(scope="module")
def endless(folder):
    """A daemon that never comes to an end."""
    with daemon(script("Hello ", context=1 << 20), folder) as running:
        yield running


def messages(result):
    assert result.exit_code == 0, result.output
    return [(message["role"], message["content"]) for message in json.loads(result.stdout)["messages"]]


def test_it_remembers(fwd, polite):
    result = fwd("chat", "--json", "--system", "Be brief.", "--uds", polite.uds, input="one\n\ntwo\n/exit\nthree\n")
    assert messages(result) == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "Hello"),
        ("user", "two"),
        ("assistant", "Hello"),
    ]


def test_clear_forgets_all_but_the_system_message(fwd, polite):
    result = fwd("chat", "--json", "--system", "S", "--uds", polite.uds, input="one\n/clear\ntwo\n")
    assert messages(result) == [("system", "S"), ("user", "two"), ("assistant", "Hello")]


def test_it_streams_to_stdout(fwd, polite):
    assert fwd("chat", "--uds", polite.uds, input="one\ntwo").stdout == "Hello\nHello\n"


def test_a_conversation_has_a_cache_key_of_its_own(fwd, polite, monkeypatch):
    seen = []

    def noted(tag, prompt, options):
        seen.append(options["cache_key"])
        return prompt_message(tag, prompt, options)

    monkeypatch.setattr("fwd.protocol.client.prompt_message", noted)
    for _ in range(2):
        assert fwd("chat", "--uds", polite.uds, input="one\ntwo").exit_code == 0
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_a_refused_message_is_forgotten(fwd, polite):
    result = fwd("chat", "--json", "--uds", polite.uds, input=f"one\n{'x' * 5000}\ntwo\n")
    assert "maximum context length is 4096" in result.stderr
    assert [content for role, content in messages(result) if role == "user"] == ["one", "two"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(endless):
    command = launch(script(), "chat", "--uds", str(endless.uds))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(2):
            child.stdin.write("go on\n")
            child.stdin.flush()
            assert child.stdout.read(12) == "Hello Hello "
            child.send_signal(signal.SIGINT)
            child.stdout.readline()
        child.stdin.close()
        assert child.wait(30) == 0


class Terminal:
    """Our end of a pseudo-terminal."""

    def __init__(self, descriptor):
        self._descriptor = descriptor
        self._seen = b""

    def until(self, wanted, again=lambda: None):
        """Read up to `wanted`; `again` is called when nothing comes for a second."""
        while wanted not in self._seen:
            if select.select([self._descriptor], [], [], 1.0)[0]:
                self._seen += os.read(self._descriptor, 4096)
            else:
                again()
        self._seen = self._seen.partition(wanted)[2]

    def write(self, keys):
        os.write(self._descriptor, keys)


def test_on_a_terminal(polite):
    """Ctrl-C at the prompt does not end it, and the line can be edited."""
    ours, theirs = pty.openpty()
    terminal = Terminal(ours)
    command = launch(script(), "chat", "--uds", str(polite.uds))
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as child:
        try:
            os.close(theirs)
            terminal.until(b"> ")
            terminal.write(b"hi\r")
            terminal.until(b"\nHello\r\n")
            terminal.until(b"> ")
            child.send_signal(signal.SIGINT)
            # CPython's readline misses a signal between its prompt and its select()
            terminal.until(b"> ", again=lambda: child.send_signal(signal.SIGINT))
            terminal.write(b"exit\x01/\r")  # Ctrl-A: to the start of the line
            assert child.wait(30) == 0
        finally:
            child.kill()
    os.close(ours)
