"""Host names, keys, and the files of the page."""

from __future__ import annotations

import httpx
import pytest
from blt_edge.tools.server import app
from blt_edge.tools.server.app import host_name, page_files
from blt_edge.tools.server.settings import is_loopback

BODY = {"prompt": "a", "max_tokens": 1}
KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


# 1. Who may ask.


def test_host_names() -> None:
    names = {
        **{"localhost:8080": "localhost", "LocalHost": "localhost", "127.0.0.1:1": "127.0.0.1"},
        **{"[::1]:8080": "::1", "[::1]": "::1", "example.org:80": "example.org"},
        **dict.fromkeys(["", ":80", "[::1].evil.org", "[::1]evil.org:80"], ""),
    }
    assert {header: host_name(header) for header in names} == names


def test_loopback() -> None:
    for name in ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(name), name
    hostile = ("127.0.0.1.example.org", "localhost.evil.org")
    for name in ("", "0.0.0.0", "::", "::ffff:10.0.0.1", "10.0.0.1", *hostile):
        assert not is_loopback(name), name


def test_another_hosts_name_is_refused_on_loopback_alone(start) -> None:
    server, opened = start(allowed_hosts=("proxy.example.org",)), start(host="0.0.0.0")
    for path in ("/", "/healthz", "/v1/models", "/metrics"):
        refused = server.get(path, headers={"Host": "evil.example.org"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
        for name in ("localhost:99", "proxy.example.org", "[::1]"):
            assert server.get(path, headers={"Host": name}).status_code == 200
    url = opened.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models", headers={"Host": "box.lan"}).status_code == 200


def test_the_key_guards_all_but_health_and_page(start) -> None:
    server = start(api_keys=("s3cret",))
    for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/v1/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            refused = server.get(path, headers=headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["code"] == "invalid_api_key"
    for path in ("/healthz", "/health", "/"):
        assert server.get(path).status_code == 200
    key = {"Authorization": "Bearer s3cret"}
    assert server.get("/metrics", headers=key).status_code == 200
    assert server.get("/v1/nothing", headers=key).status_code == 404
    assert server.post(BODY).status_code == 401
    assert server.post(BODY, headers=key).status_code == 200
    assert server.post(BODY, headers={"Authorization": "bearer \xe9".encode("latin-1")}).status_code == 401
    assert "s3cret" not in "".join(server.lines)


def test_no_cors_unless_asked(start) -> None:
    origin = {"Origin": "https://app.example.org"}
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    closed, opened = start(), start(cors_origins=("https://app.example.org",), api_keys=("k",))
    allow = "access-control-allow-origin"
    assert allow not in closed.get("/v1/models", headers=origin).headers
    assert httpx.options(f"{closed.url}/v1/completions", headers=preflight | origin).status_code == 405
    allowed = httpx.options(f"{opened.url}/v1/completions", headers=preflight | origin)
    assert (allowed.status_code, allowed.headers[allow]) == (200, origin["Origin"])
    refused = opened.get("/v1/models", headers=origin)  # readable for the page, though refused
    assert (refused.status_code, refused.headers[allow]) == (401, origin["Origin"])
    other = {**preflight, "Origin": "https://other.example.org"}
    refused = httpx.options(f"{opened.url}/v1/completions", headers=other)
    assert (refused.status_code, allow in refused.headers) == (400, False)


# 2. The page.


def test_each_file_has_its_type_and_no_page_may_run_what_is_not_in_them(server) -> None:
    files = page_files()
    assert "/" in files
    for path, content in files.items():
        answer = server.get(path)
        assert (answer.status_code, answer.content) == (200, content)
        kind = KINDS.get(path.rpartition(".")[2], "text/html")
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


OTHERS = "/index.html /page/index.html /../app.py /%2e%2e/app.py /page.js/ //page.js /page.py"


@pytest.mark.parametrize("path", OTHERS.split())
def test_nothing_else_is_read_from_the_disk(server, path: str) -> None:
    answer = server.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_without_a_page_there_is_a_note(start, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(app.resources, "files", lambda package: tmp_path)
    answer = start().get("/")
    assert answer.text.startswith("The page is not installed.")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
