"""`fwd serve` as it looks: progress on a terminal, one document with `--json`."""

import json
import os
import pty
import subprocess

from apiserver import script
from launch import launch


def test_json_when_ready(folder, tmp_path):
    command = launch(script(), "serve", str(folder), "--uds", str(tmp_path / "s"), "--http", "none", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        found = json.loads(child.stdout.readline())
        assert (found["state"], found["pid"], found["listening"]) == ("ready", child.pid, [str(tmp_path / "s")])
        child.terminate()
        assert child.stdout.read() == ""
    assert child.returncode == 0


def test_progress_on_a_terminal(folder, tmp_path):
    hold = tmp_path / "hold"
    ours, theirs = pty.openpty()
    flags = ("--uds", str(tmp_path / "s"), "--http", "none", "--log-level", "error")
    command = launch(script(hold=str(hold)), "serve", str(folder), *flags)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as child:
        os.close(theirs)
        read(ours, "the model is loading ██████████░░░░░░░░░░  50% of ")
        hold.touch()
        read(ours, f"is ready on {tmp_path / 's'}\r\n")
        child.terminate()
    assert child.returncode == 0
    os.close(ours)


def read(terminal, wanted):
    """Return when the terminal has shown `wanted`."""
    seen = b""
    while wanted.encode() not in seen:
        seen += os.read(terminal, 4096)
