"""One configuration: defaults < TOML < environment < flags, and one clear line for each mistake."""

from pathlib import Path

import msgspec
import pytest

from fwd import config
from fwd.config import Config, load
from fwd.daemon.run import _load_message
from fwd.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    def write(text):
        file = tmp_path / "fwd.toml"
        file.write_text(text)
        return str(file)

    return write


def test_the_defaults():
    assert load({}, env={}) == Config()
    assert Config().http == ("127.0.0.1:8393",)


def test_each_layer_covers_the_one_below(toml):
    file = toml('name = "file"\ndevice = "cpu"\nmax_seqs = 2\ncontext = 10\n')
    env = {"FWD_NAME": "env", "FWD_MAX_SEQS": "3", "FWD_DEVICE": "host", "OTHER": "x"}
    flags = {"name": "flag", "max_seqs": None, "dtype": None}
    made = load(flags, file, env)
    assert made == Config(name="flag", device="host", max_seqs=3, context=10)


def test_the_file_may_be_named_in_the_environment(toml):
    assert load({}, env={"FWD_CONFIG": toml("max_queue = 7")}).max_queue == 7
    assert load({}, toml("max_queue = 8"), env={"FWD_CONFIG": "/nonexistent"}).max_queue == 8


UNSUPPORTED = {"kv_dtype"}


def test_every_field_can_come_from_the_environment():
    texts = {"model": "m", "name": "n", "http": "127.0.0.1:1, unix:/x", "uds": "/u", "device": "cpu"}
    texts |= {"dtype": "float32", "keys": "k", "hosts": "a,b", "log_level": "debug"}
    texts |= {"strict": "true", "requant": "fp8-head, fp8-attn", "draft_model": "none"}
    numbers = {
        field.name: "2000000" if field.name == "kv_bytes" else "50000" if field.name == "max_body" else "9"
        for field in msgspec.structs.fields(Config)
        if field.name not in texts and field.name not in UNSUPPORTED
    }
    made = load({}, env={f"FWD_{name.upper()}": text for name, text in (texts | numbers).items()})
    assert made.http == ("127.0.0.1:1", "unix:/x")
    assert made.hosts == ("a", "b")
    untouched = [name for name in Config.__struct_fields__ if getattr(made, name) == getattr(Config(), name)]
    assert set(untouched) == UNSUPPORTED


MISTAKES = {
    "unknown key": ('colour = "red"', {}, {}, r"fwd\.toml: .*colour"),
    "wrong type": ("max_seqs = [1]", {}, {}, r"fwd\.toml: .*max_seqs"),
    "no number": ("", {"FWD_MAX_SEQS": "many"}, {}, r"environment: .*max_seqs"),
    "too large": ("", {}, {"max_seqs": 65}, r"flags: .*<= 16.*max_seqs"),
    "too small": ("", {"FWD_CONTEXT": "-1"}, {}, r"environment: .*context"),
    "not positive": ("", {}, {"hang_timeout": 0.0}, r"flags: .*hang_timeout"),
    "not a number": ("", {}, {"hang_timeout": float("nan")}, r"flags: .*hang_timeout"),
    "none of the choices": ("", {"FWD_DEVICE": "abacus"}, {}, r"environment: .*abacus.*device"),
    "no folder": ("", {}, {"draft_model": "/x"}, "draft_model: /x is no folder: name a draft model's, mtp or none"),
    "unknown flag": ("", {}, {"colour": 1}, r"flags: .*colour"),
    "no TOML": ("max_seqs = ", {}, {}, r"fwd\.toml: Invalid value"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_that_names_key_and_origin(toml, name):
    text, env, flags, message = MISTAKES[name]
    with pytest.raises(ConfigError, match=message) as caught:
        load(flags, toml(text), env)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*No such file"):
        load({}, str(tmp_path / "nowhere.toml"), {})
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        load({}, str(binary), {})


def test_a_mistake_below_is_told_though_a_layer_above_covers_it(toml):
    with pytest.raises(ConfigError, match=r"fwd\.toml"):
        load({"max_seqs": 4}, toml("max_seqs = 0"), {})


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().model = "other"


def test_the_model(tmp_path):
    assert Config().folder == Path(config.__file__).parent / "demo" / "model"
    assert Config().served_name == "demo"
    assert Config(model=str(tmp_path / "Llama-1B")).served_name == "Llama-1B"
    assert Config(model="x", name="y").served_name == "y"


def test_where_the_socket_is(monkeypatch):
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert Config().socket_path == Path("/run/fwd/fwd.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Config().socket_path == Path("/run/user/7/fwd/fwd.sock")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/fwd:/run/other")
    assert Config().socket_path == Path("/run/fwd/fwd.sock")
    assert Config(uds="/x/y.sock").socket_path == Path("/x/y.sock")


def test_where_the_state_is(monkeypatch):
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert Config().state_path is None
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/fwd:/var/lib/other")
    assert Config().state_path == Path("/var/lib/fwd")
    assert load({}, env={"FWD_STATE_DIR": "/x"}).state_path == Path("/x")
    assert _load_message(Config()).state_dir == "/var/lib/fwd"
    monkeypatch.delenv("STATE_DIRECTORY")
    assert _load_message(Config()).state_dir == ""
    monkeypatch.chdir("/tmp")
    assert _load_message(Config(state_dir="here", kv_bytes=5)).state_dir == "/tmp/here"


def test_the_engine_logs_what_the_front_is_told_to():
    assert _load_message(Config(log_level="error")).log_level == "error"


def test_the_queue_takes_any_one_prompt():
    assert Config().max_queue == 1 << 20
