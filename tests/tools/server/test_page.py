"""The page in a real browser: what a person sees, does and is told."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from importlib import resources
from itertools import accumulate

import pytest
from blt_edge.runtime import GenerationOptions
from support.browser import CONTROL, SHIFT, Browser, Tab, find_chromium
from support.scripted_server import ScriptedServer

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
)

TEXT = "née 👨‍👩‍👧 人人生而自由 يولد جميع الناس 🇫🇷 e\u0301 <b>no markup</b>\n\tend "
MANY_SCRIPTS = TEXT.encode() + b"\x07\xff \xe4\xba " + "\u202eok".encode()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(CHROMIUM) as one:
        yield one


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with browser.tab() as one:
        yield one


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    """A server without a model."""
    with ScriptedServer() as one:
        yield one


def opened(tab: Tab, address: str) -> Tab:
    tab.open(address)
    tab.wait_for("document.querySelector('#model').value")
    return tab


@pytest.fixture
def page(tab: Tab, scripted: ScriptedServer) -> Tab:
    """The scripted server's page."""
    return opened(tab, scripted.address)


def status(tab: Tab, beginning: str) -> str:
    """Wait until the status line begins so, and return it."""
    tab.wait_for(f"document.querySelector('#status').textContent.startsWith({json.dumps(beginning)})")
    return tab.text("#status")


def generated(tab: Tab, *, finger: bool = False, **options: object) -> Tab:
    """Fill the form and generate to the end."""
    for name, value in options.items():
        tab.fill(f"#{name.replace('_', '-')}", str(value))
    (tab.tap if finger else tab.click)("#generate")
    status(tab, "Done")
    return tab


def cells(tab: Tab, kind: str = "cell") -> list[str]:
    """The text of every cell that has a class."""
    return tab.evaluate(f"[...document.querySelectorAll('.cell.{kind}')].map(e => e.textContent)")


def ready(tab: Tab) -> bool:
    return not tab.evaluate("document.querySelector('#generate').disabled")


def focused(tab: Tab) -> str:
    return str(tab.evaluate("document.activeElement.id || document.activeElement.parentElement.id"))


# 1. What is shown.


def test_patches_bytes_and_entropies_are_the_model_s(tab: Tab, server, model) -> None:
    generated(opened(tab, server.url + "/"), prompt="Once upon a time", max_bytes=60, seed=3)
    data = b"Once upon a time"
    data += model.generate(data, GenerationOptions(max_new_bytes=60, temperature=0.7, seed=3)).data
    lengths = model.patch_lengths(data)[1:]  # BOS is alone in the first
    assert tab.text("#patches") == str(len(lengths))
    tab.evaluate("document.querySelector('#text').focus()")
    shown = []
    for length in lengths:
        tab.press("ArrowRight")
        rows = tab.evaluate(
            "[...document.querySelectorAll('#patch-bytes tbody tr')]"
            ".map(row => [...row.cells].map(cell => cell.innerText))"
        )
        assert len(rows) == length
        shown += rows
    assert tab.text("#patch-title") == f"Patch {len(lengths)} of {len(lengths)}"
    assert bytes(int(code, 16) for _, code, _ in shown) == data
    told = [float(entropy) for *_, entropy in shown]
    assert told == pytest.approx(model.entropies(data)[: len(data)].tolist(), abs=0.006)
    assert tab.complaints == []
    assert {re.match(r"\w+://[^/]*", url)[0] for url in tab.requests} == {server.url}  # type: ignore[index]


def test_figures_of_the_server(page: Tab) -> None:
    generated(page, max_bytes=100)
    names = ("speed", "first", "new-bytes", "guesses", "per-patch")
    assert [page.text(f"#{name}") for name in names] == ["500", "12.0 ms", "100", "31 of 40", "4.00"]
    stages = [line.split() for line in page.text("#stage-list").splitlines() if "%" in line]
    assert [share for *_, share, _ in stages] == ["14", "14", "24", "28", "20"]  # of 0.212 s
    assert "29 of 116 bytes are above the threshold of 2.00" in page.text("#entropy-summary")
    assert len(cells(page, "guessed")) == 50  # the second half of every new patch
    assert page.complaints == []


def test_whole_characters_of_many_scripts(page: Tab, scripted: ScriptedServer) -> None:
    scripted.script.answer = MANY_SCRIPTS
    scripted.script.patch_lengths = (1, 2, 3, 5)  # cuts most characters
    generated(page, prompt="", max_bytes=len(MANY_SCRIPTS))
    shown = cells(page)
    assert set(shown) >= {"é", "👨‍👩‍👧", "人", "ي", "🇫🇷", "e\u0301", "\n", "\t"}
    assert "".join(shown) == TEXT + "x07xff xe4xba u202eok"
    assert cells(page, "raw") == ["x07", "xff", "xe4", "xba", "u202e"]
    assert "人" in cells(page, "shared")
    assert page.evaluate("document.querySelector('#text b')") is None
    assert page.complaints == []


def test_cells_agree_with_another_utf8_decoder(page: Tab) -> None:
    source = random.Random(5)
    leads = b"\x41\x80\xbf\xc0\xc2\xdf\xe0\xe4\xed\xef\xf0\xf4\xf5\xff\x9f\xa0\x8f"
    texts = [bytes([byte]) for byte in range(256)]
    texts += [bytes(source.choice(leads) for _ in range(source.randrange(12))) for _ in range(1500)]
    texts += [bytes(MANY_SCRIPTS[start : start + source.randrange(40)]) for start in range(len(MANY_SCRIPTS))]
    got = page.evaluate(
        "import('/bytes.js').then(({ByteText}) => "
        + json.dumps([list(text) for text in texts])
        + ".map(bytes => { const text = new ByteText(); let at = 0;"
        " for (const byte of bytes) text.add({byte, position: at++, startsPatch: at % 3 == 1,"
        " entropy: null, guessed: false, isPrompt: false}); text.finish();"
        " return text.cells.map(c => [c.kind === 'invalid', c.first, c.count]); }))"
    )
    for text, found in zip(texts, got, strict=True):
        decoded = text.decode("utf-8", "surrogateescape")
        starts = [*accumulate((len(one.encode("utf-8", "surrogateescape")) for one in decoded), initial=0)]
        invalid = {at for at, one in zip(starts, decoded, strict=False) if 0xDC80 <= ord(one) <= 0xDCFF}
        # Every byte is in one cell, in order, and cells of invalid bytes are exactly the decoder's.
        ends = list(accumulate((count for *_, count in found), initial=0))
        assert [first for _, first, _ in found] == ends[:-1]
        assert ends[-1] == len(text)
        assert {first for bad, first, _ in found if bad} == invalid
        assert set(ends) <= set(starts)


def test_text_is_looked_at_by_pointing_and_picking(page: Tab) -> None:
    generated(page, max_bytes=40)
    page.hover(".cell", 17)  # byte 17 is in the fifth patch of four bytes
    assert page.text("#patch-title") == "Patch 5 of 14"
    assert "“ther”, 4 bytes; begins here because" in page.text("#patch-say")
    page.hover("h1")
    assert page.text("#patch-title") == "Patch"
    page.click(".cell", 1)
    page.hover("h1")
    assert page.text("#patch-title") == "Patch 1 of 14"
    assert cells(page, "on") == list("Once")
    page.click("#unpin")
    assert cells(page, "on") == []


def test_the_prompt_is_shown_in_patches_before_anything_is_asked_for(tab: Tab, server, model) -> None:
    opened(tab, server.url + "/")
    assert status(tab, "Your prompt") == "Your prompt in patches: press Generate."
    assert cells(tab, "pale") == list("Once upon a time")
    assert tab.text("#patches") == str(len(model.patch_lengths(b"Once upon a time")) - 1)
    assert "16 bytes" in tab.text("#entropy-summary")
    assert tab.evaluate(
        "document.querySelector('#copy').disabled && document.querySelector('#continue').disabled"
    )
    assert tab.complaints == []


def test_a_prompt_that_is_typed_is_shown_until_a_text_is_made(page: Tab, scripted: ScriptedServer) -> None:
    status(page, "Your prompt")
    page.fill("#prompt", "Two words")
    page.wait_for("document.querySelectorAll('.cell.pale').length === 9")
    page.click("#samples button", 4)
    page.wait_for("document.querySelector('#text').textContent === 'def __init__(self,'")
    assert scripted.script.looks == ["Once upon a time", "Two words", "def __init__(self,"]
    generated(page, max_bytes=20)
    page.fill("#prompt", "not looked at")
    time.sleep(0.6)
    assert (len(scripted.script.looks), len(cells(page, "full"))) == (3, 20)


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("eos", "the model ended the text"),
        ("stop", "a stop string ended the text"),
        ("length", "as many as asked for"),
        ("context", "the model has room for no more"),
    ],
)
def test_the_end_of_a_text_says_why(page: Tab, scripted: ScriptedServer, reason: str, why: str) -> None:
    scripted.script.reason = reason
    generated(page, max_bytes=20)
    assert page.text("#status") == f"Done after 20 bytes: {why}."
    assert page.text("#text").endswith(f"20 bytes: {why}")
    page.click("#copy")  # which takes the text alone
    assert status(page, "Copied") == "Copied 36 bytes, prompt included."


def test_what_the_checkpoint_s_makers_chose_is_in_the_form(tab: Tab, scripted: ScriptedServer) -> None:
    scripted.script.defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
    generated(opened(tab, scripted.address), max_bytes=5)
    asked = scripted.script.requests[-1]
    assert (asked["temperature"], asked["top_p"], "top_k" in asked) == (0.6, 0.9, False)
    assert "0.6 is the checkpoint\u2019s own" in tab.text("#why-temperature")


# 2. What a person does.


def test_stop_keeps_what_came(page: Tab, scripted: ScriptedServer) -> None:
    scripted.script.pause = 0.005
    page.fill("#max-bytes", "5000")
    page.click("#generate")
    page.wait_for("document.querySelectorAll('.cell.full').length > 5")
    page.click("#stop")
    said = status(page, "Stopped after")
    kept = len(cells(page, "full"))
    assert said == f"Stopped after {kept} bytes."
    assert page.text("#text").endswith(f"{kept} bytes: stopped by you")
    assert page.text("#new-bytes").replace(",", "") == str(kept)
    sent = -1
    while scripted.script.sent != sent:  # until the server has noticed; all of it would take 25 s
        sent = scripted.script.sent
        time.sleep(0.2)
    assert kept <= sent < 5000
    assert ready(page)
    assert page.complaints == []


def test_stop_before_the_first_byte_keeps_the_text_before(page: Tab, scripted: ScriptedServer) -> None:
    generated(page, max_bytes=20)
    scripted.script.pause = 30
    page.click("#generate")
    status(page, "Reading")
    page.press("Escape")
    status(page, "Stopped before the first byte.")
    assert len(cells(page)) == 36


def test_everything_by_keyboard(page: Tab, scripted: ScriptedServer) -> None:
    order = ["prompt", *["samples"] * 5, "max-bytes", "temperature", "top-p", "seed", "draft", "generate"]
    for place in [*order, "text"]:
        page.press("Tab")
        assert focused(page) == place
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in order:
        page.press("Tab", SHIFT)
    page.press("a", CONTROL)
    page.type("The end")
    page.press("Enter", CONTROL)
    status(page, "Done")
    assert scripted.script.requests[-1]["prompt"] == "The end"
    page.evaluate("document.querySelector('#generate').focus()")
    page.press("Enter")
    status(page, "Done")
    assert focused(page) == "generate"
    for place in ("copy", "continue", "text"):
        page.press("Tab")
        assert focused(page) == place
    page.press("End")
    page.press("ArrowLeft")
    assert page.text("#patch-title") == "Patch 61 of 62"
    assert page.evaluate("document.querySelector('#patch-say').ariaLive") == "polite"
    page.press("Escape")
    assert page.text("#patch-title") == "Patch"


def test_options_and_continuing(page: Tab, scripted: ScriptedServer) -> None:
    page.evaluate("document.querySelector('#draft').value = 'lookup'")
    generated(page, prompt="Hä", max_bytes=16, temperature=1.25, top_p=0.9, seed=11)
    fields = {"prompt": "Hä", "max_tokens": 16, "temperature": 1.25, "top_p": 0.9, "seed": 11}
    told = {"stream": True, "stream_options": {"include_usage": True}, "blt_details": True}
    assert scripted.script.requests[-1] == {"model": "scripted", "draft": "lookup", **fields, **told}
    page.fill("#seed", "")
    page.click("#continue")
    status(page, "Done")
    assert scripted.script.requests[-1]["prompt"] == "Hä" + "there was a king"
    assert "seed" not in scripted.script.requests[-1]
    page.allow("clipboardReadWrite", "clipboardSanitizedWrite")
    page.click("#copy")
    status(page, "Copied 35 bytes")
    assert page.evaluate("navigator.clipboard.readText()") == "Hä" + "there was a king" * 2
    page.fill("#max-bytes", "0")  # out of range: not sent
    page.click("#generate")
    assert focused(page) == "max-bytes"
    assert len(scripted.script.requests) == 2


# 3. What a person is told when something is wrong.


def test_refusals_and_a_busy_server(page: Tab, scripted: ScriptedServer) -> None:
    for status_code, message, headers, said in (
        (
            400,
            "temperature is 5000.0; allowed is 0 to 100",
            {},
            "Temperature is 5000.0; allowed is 0 to 100.",
        ),
        (429, "64 wait", {"Retry-After": "1"}, "The server is busy with other texts; asking again in 1.0 s."),
        (429, "64 wait", {"Retry-After": "30"}, "The server is busy"),
    ):
        scripted.script.refusals = [(status_code, message, headers)]
        page.click("#generate")
        status(page, said)
        if headers == {"Retry-After": "1"}:
            status(page, "Done after 240 bytes: as many as asked for.")
    page.press("Escape")
    status(page, "Stopped before the first byte.")
    assert len(cells(page, "full")) == 240


@pytest.mark.parametrize(
    ("fault", "said"), [("break_after", "The connection broke"), ("fail_after", "The model failed.")]
)
def test_a_stream_that_breaks_keeps_what_came(page: Tab, scripted: ScriptedServer, fault, said) -> None:
    setattr(scripted.script, fault, 20)
    page.click("#generate")
    assert status(page, said).endswith("20 bytes had come and are kept.")
    assert len(cells(page, "full")) == 20
    assert page.text("#text").endswith("20 bytes: it broke off")


def test_a_server_that_is_gone(tab: Tab) -> None:
    with ScriptedServer() as server:
        generated(opened(tab, server.address), max_bytes=20)
    tab.click("#generate")
    status(tab, "The server does not answer.")
    assert len(cells(tab)) == 36
    assert ready(tab)


def give_key(tab: Tab, key: str) -> None:
    tab.wait_for("document.querySelector('#key-dialog').open")
    tab.type(key)
    tab.press("Enter")


def test_a_server_with_a_key(tab: Tab, scripted: ScriptedServer) -> None:
    scripted.script.key = "s3cret"
    tab.open(scripted.address)
    give_key(tab, "wrong")
    tab.wait_for("!document.querySelector('#key-wrong').hidden")
    give_key(tab, "s3cret")
    tab.wait_for("document.querySelector('#model').value")
    generated(tab, max_bytes=10)
    scripted.script.key = "another"  # asked for again, and the text is made once it is there
    tab.click("#generate")
    give_key(tab, "another")
    status(tab, "Done")
    kept = "JSON.stringify([localStorage.length, document.cookie, location.href.includes('another')])"
    assert tab.evaluate(kept) == '[0,"",false]'
    assert all("another" not in url for url in tab.requests)


# 4. How it looks, and to whom.


@pytest.mark.parametrize("width", [390, 320])
def test_on_a_phone(tab: Tab, scripted: ScriptedServer, width: int) -> None:
    scripted.script.answer = MANY_SCRIPTS + b"a" * 90
    tab.emulate(width, 844, phone=True)
    opened(tab, scripted.address)
    wide = "[...document.querySelectorAll('body *:not(#samples *, .strip *, .unseen, option)')]"
    over = f"{wide}.filter(e => e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML)"
    assert tab.evaluate(over) == []
    generated(tab, finger=True, prompt="W" * 200)
    edges = "(name => (b => [b.top, b.bottom])(document.querySelector(name).getBoundingClientRect()))"
    # Figures are in view with the buttons, and above the text.
    actions, numbers, text = [tab.evaluate(f"{edges}('{one}')") for one in (".actions", ".numbers", "#text")]
    assert actions[1] <= numbers[0] < numbers[1] <= text[0]
    assert numbers[1] - actions[0] < 300
    tab.evaluate("document.querySelector('#text').scrollTo(0, 0)")
    tab.tap(".cell", 2)
    tab.wait_for("document.querySelectorAll('.on').length")
    assert tab.evaluate(over) == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    top, bottom = tab.evaluate(f"{edges}('#inspector')")
    assert 400 < top < bottom <= 844
    assert tab.evaluate(f"{edges}('.on')")[1] <= top
    tab.tap("#unpin")
    tab.wait_for("document.querySelector('#inspector').hasAttribute('data-empty')")


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_in_both_themes(tab: Tab, scripted: ScriptedServer, dark: bool) -> None:
    tab.emulate(1200, 900, dark=dark, still=True)
    scripted.script.answer = b"nine \xff\n"
    opened(tab, scripted.address)
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 380) == dark
    generated(tab, max_bytes=60)
    measured = []
    for patch in range(12):  # every hue, of the prompt and of new bytes, as it is and looked at
        tab.evaluate("document.querySelector('#text').focus()")
        tab.press("ArrowRight")
        measured += tab.contrasts()
        assert tab.text("#patch-title").startswith(f"Patch {patch + 1} ")
    scripted.script.refusals = [(400, "no", {})]
    tab.click("#generate")
    status(tab, "No.")
    measured += tab.contrasts()
    classes = " ".join(row[1] for row in measured)
    assert all(name in classes for name in ["h0", "h1", "h2", "h3", "pale", "full", "on", "raw", "wrong"])
    assert min(measured)[0] >= 4.5, min(measured)


def test_who_prefers_less_motion(page: Tab, scripted: ScriptedServer) -> None:
    scripted.script.pause = 0.005
    page.click("#generate")
    page.wait_for("!!document.querySelector('.caret')")
    assert page.evaluate("getComputedStyle(document.querySelector('.caret')).animationName") == "blink"
    page.emulate(1200, 900, still=True)
    assert page.evaluate("document.getAnimations().length") == 0


def test_what_a_screen_reader_has(page: Tab) -> None:
    status(page, "Your prompt")
    page.evaluate(
        "(window.said = [], line => new MutationObserver(() => said.push(line.textContent))"
        ".observe(line, {childList: true}))(document.querySelector('#status'))"
    )
    generated(page)
    assert page.evaluate("said") == [
        "Reading the prompt…",
        "Generating…",
        "Done after 240 bytes: as many as asked for.",
    ]
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "textbox", "spinbutton", "combobox", "region", "group", "image", "textarea"}
    for node in nodes:
        role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value")
        assert node.get("ignored") or role not in named or name, node
    assert sum(node.get("role", {}).get("value") == "button" for node in nodes) >= 9


def test_long_texts_stay_quick(page: Tab) -> None:
    """20,000 bytes: the strip's canvas stays as wide as the page, and the end is in view."""
    generated(page, max_bytes=20_000)
    assert len(cells(page)) == 20_016
    canvas, whole, end = page.evaluate(
        "(s => [s.querySelector('canvas').width, s.scrollWidth, s.scrollLeft + s.clientWidth])"
        "(document.querySelector('#strip'))"
    )
    assert canvas <= 1200
    assert whole == pytest.approx(end, abs=2)
    assert whole > 200_000
    below = "(t => t.scrollHeight - t.scrollTop - t.clientHeight)(document.querySelector('#text'))"
    assert page.evaluate(below) <= 2


def test_files_hold_to_the_page_s_policy() -> None:
    """Nothing inline, nothing from elsewhere, nothing set as markup."""
    folder = resources.files("blt_edge.tools.server") / "page"
    files = {file.name: file.read_text() for file in folder.iterdir()}
    assert set(files) >= {"index.html", "page.css", "page.js", "icon.svg"}
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?! type=\"module\" src=)", files["index.html"])
    for name, text in files.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
