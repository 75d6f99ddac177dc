"""`fwd demo` on the fake engine: what it prints, and that it leaves no daemon."""

import json
import subprocess
import sys

from fakes import Fault, Script
from launch import launch

from fwd.cli.demo import PROMPT


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
    assert "no drafters" in acceptance
    assert list(tmp_path.iterdir()) == []


def test_json():
    done = play(Script(), "--json", "--max-tokens", "5", "--prompt", "x = ")
    found = json.loads(done.stdout)
    assert (found["prompt"], found["output_tokens"], found["seed"]) == ("x = ", 5, 0)
    assert found["engine"]["kernel_set"] == "fake"


def test_an_engine_that_cannot_start(tmp_path):
    done = play(Script(always=Fault("bad_model"), lives=str(tmp_path / "lives")))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fwd: model.safetensors: the tensor lm_head is missing\n"


WATCH = """
import socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect(sys.argv[1])
    print(flush=True)
    while link.recv(4096):
        pass
"""


def test_the_private_daemon_ends_with_us(tmp_path):
    """When `fwd demo` is killed, its daemon closes its connections and goes."""
    uds = tmp_path / "s"
    command = launch(Script(hold=str(tmp_path / "hold")), "demo", "--uds", str(uds))
    with subprocess.Popen(command) as child:
        while not uds.exists():
            assert child.poll() is None
        watch = [sys.executable, "-c", WATCH, str(uds)]
        with subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            client.stdout.readline()
            child.kill()
            assert (client.wait(30), client.stderr.read()) == (0, "")
