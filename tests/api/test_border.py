"""What every request meets first: keys, hosts, browsers, sizes, ids, and errors in one shape."""

import asyncio
import hashlib
import json

import pytest
from apiserver import NAME, script, serving

from fwd.api import app
from fwd.api.access import PUBLIC, read_keys
from fwd.errors import ConfigError

CHAT = "/v1/chat/completions"
GOOD = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
KEYS = ["sk-one", "schlüssel-zwei"]
ANSWERS = {
    ("POST", CHAT): (GOOD, 200),
    ("POST", "/v1/completions"): ({"prompt": "hi", "max_tokens": 2}, 200),
    ("GET", "/v1/models"): (None, 200),
    ("GET", "/v1/models/{model}"): (None, 404),
    ("POST", "/tokenize"): ({"prompt": "hi"}, 200),
    ("POST", "/detokenize"): ({"tokens": [20]}, 200),
    ("GET", "/live"): (None, 200),
    ("GET", "/ready"): (None, 200),
    ("GET", "/health"): (None, 200),
    ("GET", "/metrics"): (None, 200),
    ("DELETE", "/v1/requests/{id}"): (None, 404),
    ("GET", "/nowhere"): (None, 404),
    ("PUT", "/v1/models"): (None, 405),
}


def digest(key):
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{digest(KEYS[0])}\n\n{digest(KEYS[1])}\n")
    return str(path)


async def raw(server, data):
    """Status line, headers and body of whatever the server answers to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(data)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), head.decode(), body.decode()


async def get(server, *headers, path="/v1/models"):
    lines = "".join(f"{header}\r\n" for header in headers)
    return await raw(server, f"GET {path} HTTP/1.1\r\nConnection: close\r\n{lines}\r\n".encode())


def test_the_matrix_knows_every_route(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            built = app.build(server.service)
            routes = {(route.method, route.resource.canonical) for route in built.router.routes()}
            assert {(method, path) for method, path in routes if method != "HEAD"} <= ANSWERS.keys()

    run(scenario())


def test_who_may_come_in(folder, run, keys):
    bad = [{}, {"Authorization": "Bearer sk-two"}, {"x-api-key": digest(KEYS[0])}, {"Authorization": "Basic sk-one"}]
    bad += [{"Authorization": "Bearer"}, {"x-api-key": ""}, {"Authorization": f"Bearer {KEYS[0]}x"}]
    good = [{"Authorization": f"Bearer {key}"} for key in KEYS]
    good += [{"x-api-key": KEYS[0]}, {"authorization": "bearer sk-one"}]

    async def scenario():
        async with serving(folder, script("x"), keys=keys) as server:
            for (method, path), (body, wanted) in ANSWERS.items():
                for headers in bad + good:
                    url = server.url + path
                    async with server.session.request(method, url, json=body, headers=headers) as response:
                        expected = wanted if path in PUBLIC or headers in good else 401
                        assert response.status == expected, (method, path, headers)
                        if expected == 401:
                            assert (await response.json())["error"]["code"] == "invalid_api_key"

    run(scenario())


def test_without_keys_everybody_may(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            for (method, path), (body, wanted) in ANSWERS.items():
                async with server.session.request(method, server.url + path, json=body) as response:
                    assert response.status == wanted, (method, path)

    run(scenario())


def test_an_empty_keys_file_lets_nobody_in(folder, run, tmp_path):
    (tmp_path / "keys").write_text("\n")

    async def scenario():
        async with serving(folder, script("x"), keys=str(tmp_path / "keys")) as server:
            assert (await server.get("/v1/models"))[0] == 401

    run(scenario())


@pytest.mark.parametrize("line", ["sk-one", "A" * 64, "a" * 63, "a" * 64 + " # me"])
def test_a_broken_keys_file_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "keys"
    path.write_text(f"{digest('x')}\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert f"{path}:2" in caught.value.message
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "none")
    assert "none" in caught.value.message


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8393", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("localhost.", 200),
        ("[::1]:8393", 200),
        ("friend.example:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example@127.0.0.1", 403),
        ("10.0.0.1", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_hosts(folder, run, host, status):
    async def scenario():
        async with serving(folder, script("x"), hosts=("Friend.example",)) as server:
            found, _, body = await get(server, f"Host: {host}")
            assert found == status
            assert status == 200 or json.loads(body)["error"]["code"] == "forbidden"

    run(scenario())


def test_a_request_without_a_host(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            assert (await get(server))[0] == 400
            assert (await raw(server, b"GET /v1/models HTTP/1.0\r\n\r\n"))[0] == 403

    run(scenario())


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 200), ("same-origin", 200), ("none", 200)]
)
def test_pages_of_other_sites_may_not_call(folder, run, site, status):
    async def scenario():
        async with serving(folder, script("x")) as server:
            found, head, _ = await get(server, "Host: localhost", f"Sec-Fetch-Site: {site}", "Origin: http://x.example")
            assert found == status
            assert "access-control" not in head.lower()

    run(scenario())


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_a_body_must_be_sent_as_json(folder, run, kind):
    async def scenario():
        async with serving(folder, script("x")) as server:
            headers = {"Content-Type": kind}
            for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
                async with server.session.post(server.url + path, data=json.dumps(GOOD), headers=headers) as response:
                    assert response.status == 415
                    assert (await response.json())["error"]["code"] == "unsupported_media_type"

    run(scenario())


def test_a_charset_does_not_matter(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            headers = {"Content-Type": "application/json; charset=utf-8"}
            async with server.session.post(server.url + CHAT, data=json.dumps(GOOD), headers=headers) as response:
                assert response.status == 200

    run(scenario())


def test_routes_that_do_not_exist(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            status, body, _ = await server.get("/v1/nothing")
            message = "there is no GET /v1/nothing here"
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": "not_found"}
            assert (status, body) == (404, {"error": error})
            status, body, headers = await server.get(CHAT)
            message = f"GET is not possible on {CHAT}: use POST"
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": "method_not_allowed"}
            assert (status, body, headers["Allow"]) == (405, {"error": error}, "POST")

    run(scenario())


@pytest.mark.parametrize("given", ["abc-123", "a" * 128, "A.b_c:d"])
def test_a_request_id_comes_back(folder, run, given):
    async def scenario():
        async with serving(folder, script("x")) as server:
            headers = {"X-Request-Id": given}
            _, body, found = await server.post(CHAT, GOOD, headers=headers)
            assert found["X-Request-Id"] == given
            assert body["id"] == f"chatcmpl-{given}"
            assert (await server.get("/nowhere", headers=headers))[2]["X-Request-Id"] == given
            async with server.session.post(server.url + CHAT, json={**GOOD, "stream": True}, headers=headers) as answer:
                assert answer.headers["X-Request-Id"] == given

    run(scenario())


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "ü", "<x>"])
def test_a_bad_request_id_is_replaced(folder, run, given):
    async def scenario():
        async with serving(folder, script("x")) as server:
            found = [(await server.get("/live", headers={"X-Request-Id": given}))[2]["X-Request-Id"] for _ in range(2)]
            assert len(set(found)) == 2
            assert all(len(number) == 24 for number in found)

    run(scenario())


def test_a_body_over_the_limit_is_not_worth_a_retry(folder, run):
    async def scenario():
        async with serving(folder, script("x"), max_body=2000) as server:
            status, body, headers = await server.post(CHAT, {**GOOD, "user": "x" * 3000})
            assert (status, body["error"]["code"]) == (413, "body_too_large")
            assert "2000 bytes" in body["error"]["message"]
            assert headers["x-should-retry"] == "false"
            assert (await server.post(CHAT, GOOD))[0] == 200

    run(scenario())


def test_a_bug_is_an_internal_error_without_a_trace(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:

            def broken(_submits):
                raise ZeroDivisionError("secret")

            server.service.open_all = broken
            for stream in (False, True):
                status, body, headers = await server.post(CHAT, {**GOOD, "stream": stream})
                error = {"message": "internal error", "type": "server_error", "param": None, "code": "internal_error"}
                assert (status, body) == (500, {"error": error})
                assert headers["x-should-retry"] == "false"

    run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        (
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        ),
    ],
    ids=["garbage", "line", "field", "length", "both", "chunk"],
)
def test_broken_http_is_a_400(folder, run, data):
    async def scenario():
        async with serving(folder, script("x")) as server:
            status, _, body = await raw(server, data)
            assert status == 400
            assert "Traceback" not in body
            assert (await server.get("/live"))[0] == 200

    run(scenario())


def test_a_unix_socket_needs_no_host_but_a_key(folder, run, tmp_path, keys):
    path = str(tmp_path / "http.sock")

    async def ask(*headers):
        reader, writer = await asyncio.open_unix_connection(path)
        lines = "".join(f"{header}\r\n" for header in headers)
        writer.write(f"GET /v1/models HTTP/1.1\r\nHost: whatever.example\r\nConnection: close\r\n{lines}\r\n".encode())
        head = await reader.read()
        writer.close()
        await writer.wait_closed()
        return int(head.split()[1])

    async def scenario():
        async with serving(folder, script("x"), unix=path, keys=keys):
            assert await ask() == 401
            assert await ask("Authorization: Bearer sk-one") == 200

    run(scenario())
