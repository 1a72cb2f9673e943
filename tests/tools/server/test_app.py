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
    names = ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"]
    assert [name for name in names if not is_loopback(name)] == []
    others = [
        "",
        "0.0.0.0",
        "::",
        "::ffff:10.0.0.1",
        "10.0.0.1",
        "127.0.0.1.example.org",
        "localhost.evil.org",
    ]
    assert [name for name in others if is_loopback(name)] == []


def test_another_hosts_name_is_refused_on_loopback(start) -> None:
    server = start(allowed_hosts=("proxy.example.org",))
    for path in ("/", "/healthz", "/v1/models", "/metrics"):
        refused = server.get(path, headers={"Host": "evil.example.org"})
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "host_not_allowed"
        for name in ("localhost:99", "proxy.example.org", "[::1]"):
            assert server.get(path, headers={"Host": name}).status_code == 200


def test_on_other_addresses_every_name_is_let_through(start) -> None:
    server = start(host="0.0.0.0")
    port = server.url.rpartition(":")[2]
    answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Host": "box.lan"})
    assert answer.status_code == 200


def test_the_key_guards_all_but_health_and_page(start) -> None:
    server = start(api_key="s3cret")
    for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/v1/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            refused = server.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
    for path in ("/healthz", "/"):
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
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    closed, opened = start(), start(cors_origins=("https://app.example.org",), api_key="k")
    assert "access-control-allow-origin" not in closed.get("/v1/models", headers=origin).headers
    assert httpx.options(f"{closed.url}/v1/completions", headers=preflight).status_code == 405
    allowed = httpx.options(
        f"{opened.url}/v1/completions",
        headers={**preflight, "Access-Control-Request-Headers": "authorization,content-type"},
    )
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.org"
    refused = opened.get("/v1/models", headers=origin)  # readable for the page, though refused
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example.org"
    other = httpx.options(
        f"{opened.url}/v1/completions", headers={**preflight, "Origin": "https://other.example.org"}
    )
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


# 2. The page.


def test_each_file_has_its_type_and_no_page_may_run_what_is_not_in_them(server) -> None:
    files = page_files()
    assert "/" in files
    for path, content in files.items():
        answer = server.get(path)
        assert answer.status_code == 200
        assert answer.content == content
        kind = KINDS.get(path.rpartition(".")[2], "text/html")
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["/index.html", "/page/index.html", "/../app.py", "/%2e%2e/app.py", "/page.js/", "//page.js", "/page.py"],
)
def test_nothing_else_is_read_from_the_disk(server, path: str) -> None:
    answer = server.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_without_a_page_there_is_a_note(start, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(app.resources, "files", lambda package: tmp_path)
    answer = start().get("/")
    assert answer.text.startswith("The page is not installed.")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
