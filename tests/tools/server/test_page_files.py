"""The page: its files, their types, what else is not served."""

from __future__ import annotations

import blt_edge.tools.server.app as page_files
import pytest

KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def test_each_file_has_its_type_and_no_page_may_run_what_is_not_in_them(server) -> None:
    files = page_files.page_files()
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
    monkeypatch.setattr(page_files.resources, "files", lambda package: tmp_path)
    answer = start().get("/")
    assert answer.text.startswith("The page is not installed.")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
