"""The daemon process: ordered start, ordered stop, inherited sockets, model folders that cannot be served."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import msgspec
import pytest
from apiserver import script
from checkpoints import make
from fakes import Fault
from launch import daemon, launch

from fwd.cli.bench.http import free_port
from fwd.cli.common import wait_ready
from fwd.protocol.client import Client
from fwd.protocol.local import Text
from fwd.protocol.messages import Finished
from fwd.protocol.requests import prompt_message

SHARD = "model-00001-of-00001.safetensors"
STEADY = "ping_interval = 0.005\nstop_timeout = 3600.0\n"


@pytest.fixture
def steady(tmp_path):
    """A configuration whose heartbeat, which is also the step of `pace="ping"`, is quick, and that waits for ever."""
    path = tmp_path / "fwd.toml"
    path.write_text(STEADY)
    return ("--config", str(path))


class Unix(http.client.HTTPConnection):
    """HTTP on a socket file."""

    def __init__(self, path):
        super().__init__("localhost")
        self._path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def get(connection, path):
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_ready_says_why_not_and_then_yes(folder, tmp_path):
    hold, port = tmp_path / "hold", free_port()
    with daemon(script(hold=str(hold)), folder, "--http", f"127.0.0.1:{port}", ready=False) as running:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        status, body = get(connection, "/ready")
        assert (status, body["ready"]) == (503, False)
        assert body["reason"]
        assert get(connection, "/live")[0] == 200
        hold.touch()
        with Client(running.uds) as client:
            wait_ready(client)
        assert get(connection, "/ready")[0] == 200
        connection.close()


def test_http_on_a_socket_file(folder, tmp_path):
    path = tmp_path / "http.sock"
    with daemon(script("abc"), folder, "--name", "m", "--http", f"unix:{path}"):
        connection = Unix(path)
        status, body = get(connection, "/v1/models")
        assert (status, [model["id"] for model in body["data"]]) == (200, ["m"])
        connection.close()
    assert not path.exists()


def test_inherited_sockets(folder, tmp_path):
    """Descriptor 3 is HTTP, descriptor 4 by its name the local socket; the files stay, they are not ours."""
    uds = tmp_path / "local.sock"
    with socket.create_server(("127.0.0.1", 0)) as web, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(uds))
        local.listen()
        port = web.getsockname()[1]
        arm = f'LISTEN_PID=$$ exec "$@" 3<&{web.fileno()} 4<&{local.fileno()}'
        command = ["bash", "-c", arm, "bash", *launch(script(), "serve", str(folder), "--uds", str(tmp_path / "no"))]
        environment = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:local"}
        child = subprocess.Popen(command, env=environment, pass_fds=(web.fileno(), local.fileno()))
    with child, Client(uds) as client:
        wait_ready(client)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        assert get(connection, "/ready")[0] == 200
        connection.close()
        child.terminate()
    assert child.returncode == 0
    assert uds.exists()
    assert not (tmp_path / "no").exists()


def test_sigterm_lets_open_answers_finish(folder, steady):
    with daemon(script("abc", pace="ping"), folder, *steady) as running, Client(running.uds) as client:
        events = client.events("x", max_tokens=60)
        next(events)
        running.child.terminate()
        *pieces, last = events
        assert "".join(piece.text for piece in pieces if isinstance(piece, Text)) == "abc" * 20
        assert isinstance(last, Finished)
        assert last.reason == "length"
        assert running.child.wait(30) == 0
        assert not running.uds.exists()


def test_a_second_signal_hurries(folder, steady):
    with daemon(script("abc", pace="ping", context=1 << 20), folder, *steady) as running, Client(running.uds) as client:
        events = client.events("x")
        next(events)
        running.child.send_signal(signal.SIGINT)
        while client.status().state != "stopping":
            pass
        assert running.child.poll() is None
        running.child.terminate()
        assert running.child.wait(30) == 0


def ended(*arguments, engine=None):
    """Run `fwd serve` to its end; its code and its line."""
    code = "from fwd.cli import main; main()"
    command = launch(engine, "serve") if engine else [sys.executable, "-c", code, "serve"]
    done = subprocess.run(
        [*command, "--http", "none", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert all(event["event"] for event in events)
    return done.returncode, lines[0], [event for event in events if event["event"] == "model_loading"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make("llama", path)
    return path


def index(folder, shard, **metadata):
    """Put an index beside the weights, which get the name of a shard; all of it is said to stand in `shard`."""
    with (folder / "model.safetensors").open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    (folder / "model.safetensors").rename(folder / SHARD)
    names = dict.fromkeys(table.keys() - {"__metadata__"}, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": names}))


def spoil(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "half-written":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "architecture":
        config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    elif how == "sum":
        index(folder, SHARD, sha256={SHARD: "0" * 64})
    elif how == "missing":
        index(folder, "other.safetensors")
    elif how == "outside":
        index(folder, f"../model/{SHARD}")
    elif how == "tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("half-written", ["model.safetensors"]),
        ("pickle", ["pickled", "safetensors"]),
        ("architecture", ["MambaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ("sum", [SHARD, "is damaged", "0" * 64]),
        ("missing", ["other.safetensors is missing"]),
        ("outside", [f"../model/{SHARD}", "plain name"]),
        ("tokenizer", ["tokenizer.json"]),
    ],
)
def test_a_folder_that_cannot_be_served(checkpoint, tmp_path, how, words):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder, how)
    code, line, loading = ended(folder, "--uds", tmp_path / "s")
    assert code == 2, line
    assert bool(loading) == (how == "sum")  # all else is refused before a weight is read
    assert line.startswith("fwd: ")
    assert all(word in line for word in words), line
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_not_there(tmp_path):
    code, line, _ = ended(tmp_path / "missing", "--uds", tmp_path / "s")
    assert code == 2
    assert "missing" in line


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--draft-model", "x"), "draft"),
        (("--max-seqs", "17"), "max_seqs"),
        (("--context", "-1"), "context"),
        (("--threads", "two"), "--threads"),
        (("--hang-timeout", "nan"), "hang_timeout"),
        (("--log-level", "loud"), "log_level"),
        (("--device", "tpu"), "--device"),
        (("--config", "/none.toml"), "none.toml"),
    ],
)
def test_a_setting_that_is_refused(folder, tmp_path, flags, word):
    code, line, _ = ended(folder, *flags, "--uds", tmp_path / "s", engine=script())
    assert (code, word in line) == (2, True), line


def test_an_engine_that_cannot_start(folder, tmp_path):
    code, line, _ = ended(
        folder, "--uds", tmp_path / "s", engine=script(always=Fault("bad_model"), lives=str(tmp_path / "l"))
    )
    assert (code, line) == (2, "fwd: model.safetensors: the tensor lm_head is missing")
    code, line, _ = ended(
        folder, "--uds", tmp_path / "s", engine=script(always=Fault("vanish"), lives=str(tmp_path / "v"))
    )
    assert code == 6
    assert "did not start" in line


SIGNAL_IN_A_CALLBACK = """
import os, signal, sys, weakref

class Finder:
    def find_spec(self, name, *_):
        if name == "fwd.daemon.run" and (victim := self.__dict__.pop("victim", None)):
            seen = weakref.ref(victim, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            del victim

finder = Finder()
finder.victim = Finder()
sys.meta_path.insert(0, finder)
from fwd.cli import main
main()
"""


def test_a_signal_whose_exception_is_lost_while_modules_are_imported(folder, tmp_path):
    """Python ignores what is raised in a callback of a weak reference, and imports have such callbacks."""
    command = [sys.executable, "-c", SIGNAL_IN_A_CALLBACK, "serve", str(folder), "--http", "none"]
    command += ["--uds", str(tmp_path / "s")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Exception ignored" in done.stderr
    assert not (tmp_path / "s").exists()


def test_stop_returns_when_the_daemon_is_gone(folder, steady):
    """Its engine is frozen, so that stopping takes a while; the path is free at once, and the process ends before."""
    with daemon(script("abc"), folder, *steady) as running:
        with Client(running.uds) as client:
            os.kill(client.status().engine.pid, signal.SIGSTOP)
            client.stop()
        assert running.child.wait(30) == 0
        assert not running.uds.exists()


def test_a_template_that_does_not_end_keeps_nobody_from_leaving(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    spin = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    settings["chat_template"] = f"{{% if messages[0]['content'] == 'spin' %}}{spin}{{% endif %}}ok"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    hasty = tmp_path / "hasty.toml"
    hasty.write_text("stop_timeout = 0.1\n")
    with daemon(script(), model, "--config", str(hasty)) as running, Client(running.uds) as client:
        client._channel.send(prompt_message(1, [{"role": "user", "content": "spin"}], {}))
        assert client.status().state == "ready"
        running.child.terminate()
        assert running.child.wait(60) == 0


def test_a_stop_waits_for_readers_that_lag(folder, steady):
    """The engine is done long before: what it said is in the journal, and the reader gets all of it after SIGTERM."""
    long = script("abcdefgh" * 8)
    with daemon(msgspec.structs.replace(long, context=1 << 21), folder, *steady) as running:
        with Client(running.uds) as client:
            events = client.submit([1], max_tokens=1 << 18)
            next(events)
            with Client(running.uds) as other:
                while other.status().requests:
                    pass
            running.child.terminate()
            *tokens, last = events
        assert isinstance(last, Finished)
        assert sum(len(event.ids) for event in tokens) == 1 << 18
        assert running.child.wait(60) == 0
