"""`fwd demo` on the fake engine: what it prints, and that it leaves no daemon."""

import json
import subprocess
import sys
import time

from fakes import Fault, Script
from launch import launch

from fwd.cli.demo import PROMPT
from fwd.protocol.values import Timing


def play(engine, *arguments):
    return subprocess.run(launch(engine, "demo", *arguments), capture_output=True, text=True, timeout=120, check=False)


def test_it_streams_and_says_how_fast(tmp_path):
    done = play(Script(), "--uds", str(tmp_path / "s"), "--max-tokens", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    *_, speed, engine, acceptance = done.stdout.splitlines()
    assert "20 tokens" in speed
    assert "tokens/s, first token after" in speed
    assert "float32 on cpu (fake)" in engine
    assert acceptance == "acceptance: nothing was drafted"
    assert list(tmp_path.iterdir()) == []


def test_it_says_how_much_was_drafted():
    told = Timing(drafted={"suffix": 10, "model": 10}, accepted={"suffix": 2, "model": 8})
    done = play(Script(cached=told), "--max-tokens", "20")
    assert done.stdout.splitlines()[-1] == "acceptance: 50% of 20 drafted tokens, 1.50 tokens a step"


def test_json():
    done = play(Script(), "--json", "--max-tokens", "5", "--prompt", "x = ")
    found = json.loads(done.stdout)
    assert (found["prompt"], found["output_tokens"], found["seed"]) == ("x = ", 5, 0)
    assert found["engine"]["kernel_set"] == "fake"


def test_an_engine_that_cannot_start(tmp_path):
    done = play(Script(always=Fault("bad_model"), lives=str(tmp_path / "lives")))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fwd: model.safetensors: the tensor lm_head is missing\n"


def test_the_private_daemon_ends_with_us(tmp_path):
    """When `fwd demo` is killed, its daemon stops in order: the socket file goes."""
    uds = tmp_path / "s"
    command = [sys.executable, "-c", "from fwd.cli import main; main()", "demo", "--uds", str(uds)]
    with subprocess.Popen(command) as child:
        until(lambda: uds.exists() or child.poll() is not None)
        assert child.poll() is None
        child.kill()
    until(lambda: not uds.exists())


def until(condition):
    """Look again and again; the time limit of the test ends a wait in vain."""
    while not condition():
        time.sleep(0.01)
