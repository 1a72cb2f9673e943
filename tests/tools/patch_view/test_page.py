"""The page: whole, self-contained, and a text can't become markup or a script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from blt_edge.tools.patch_view.page import html_page


class Reader(HTMLParser):
    """What a browser would find."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.scripts: list[str] = []
        self._kept = {"bdi": self.shown, "script": self.scripts}
        self._into: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._into = self._kept.get(tag)
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


@pytest.mark.parametrize("rule", [{}, {"mode": "byte", "patcher": False}])
def test_everything_is_there(make_view, odd_text: bytes, rule: dict) -> None:
    view = make_view(odd_text, **rule)
    page = Reader(html_page(view, "model"))
    assert page.shown == [cluster.shown for cluster in view.clusters]
    assert [tag for tag, _ in page.tags].count("i") == len(odd_text)
    data = json.loads(page.scripts[0])
    assert bytes(row[0] for row in data["rows"]) == odd_text
    assert [row[3] for row in data["rows"]] == view.patches
    assert [row[2] is None for row in data["rows"]] == [view.entropies is None] * len(odd_text)
    assert data["lengths"] == view.lengths
    assert {row[4] for row in data["rows"]} - {None} <= set(data["words"])
    classes = [(attributes.get("class") or "").split() for tag, attributes in page.tags if tag in "bi"]
    assert sum("s" in names for names in classes) == len(view.starts)


def test_no_request_leaves_it(make_view, odd_text: bytes) -> None:
    page = html_page(make_view(odd_text), "model")
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", page)
    assert {tag for tag, _ in Reader(page).tags} & {"img", "link", "iframe", "object", "base"} == set()


def test_texts_are_no_markup(make_view) -> None:
    attack = b"</script><script>alert(1)</script><img onerror=x>\"'&lt;</bdi><!-- ]]>"
    source = html_page(make_view(attack, share=0.1), "<b onclick=x>")
    page = Reader(source)
    assert "".join(page.shown) == attack.decode()
    assert len(page.scripts) == 2
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "<b onclick" not in source
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    hidden = html_page(make_view("\u202e\u2066\0\x1b".encode()), "")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\0\x1b]", hidden)


def test_its_policy_lets_its_own_script_run_and_no_other(make_view) -> None:
    page = Reader(html_page(make_view(b"text"), "model"))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_it_is_for_phones_keyboards_and_both_schemes(make_view) -> None:
    page = html_page(make_view(b"text"), "model")
    for word in ("width=device-width", "prefers-color-scheme:dark", "aria-live=polite"):
        assert word in page
    (text,) = [attributes for _, attributes in Reader(page).tags if attributes.get("id") == "t"]
    assert (text["tabindex"], bool(text["aria-label"])) == ("0", True)


def test_numbers_that_are_none(make_view) -> None:
    view = make_view(b"abc")
    view.entropies[1] = float("nan")
    view.entropies[2] = float("inf")
    data = json.loads(Reader(html_page(view, "model")).scripts[0])
    assert [row[2] is None for row in data["rows"]] == [False, True, True]
