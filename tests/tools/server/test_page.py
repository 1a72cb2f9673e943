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
from support.browser import CONTROL, SHIFT, Browser, Tab, find_chromium
from support.scripted_server import Script, ScriptedServer

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
)

MANY_SCRIPTS = (
    "née 👨‍👩‍👧 人人生而自由 يولد جميع الناس 🇫🇷 e\u0301 <b>no markup</b>\n\tend \x07".encode()
    + b"\xff \xe4\xba "
    + "\u202eok".encode()
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as one:
        yield one


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with browser.tab() as one:
        yield one


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as one:
        yield one


@pytest.fixture
def scripted(shared_server: ScriptedServer) -> ScriptedServer:
    """A server without a model, at the start of a new script."""
    shared_server.script = Script()
    return shared_server


def opened(tab: Tab, address: str) -> Tab:
    tab.open(address)
    tab.wait_for("document.querySelector('#model').value")
    return tab


def status(tab: Tab, beginning: str, timeout: float = 15) -> str:
    """Wait until the status line begins so, and return it."""
    tab.wait_for(
        f"document.querySelector('#status').textContent.startsWith({json.dumps(beginning)})", timeout
    )
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
    found: list[str] = tab.evaluate(f"[...document.querySelectorAll('.cell.{kind}')].map(e => e.textContent)")
    return found


def new_bytes(tab: Tab) -> int:
    return int(tab.text("#new-bytes").replace(",", ""))


# 1. What is shown.


def test_patches_bytes_and_entropies_are_the_model_s(tab: Tab, server, tiny) -> None:
    from blt_edge.runtime import GenerationOptions

    opened(tab, server.url + "/")
    generated(tab, prompt="Once upon a time", max_bytes=60, seed=3)
    data = b"Once upon a time"
    data += tiny.generate(data, GenerationOptions(max_new_bytes=60, temperature=0.7, seed=3)).data
    lengths = tiny.patch_lengths(data)[1:]  # BOS is alone in the first
    assert tab.text("#patches") == str(len(lengths))
    tab.evaluate("document.querySelector('#text').focus()")
    shown = []
    for _ in lengths:
        tab.press("ArrowRight")
        rows = tab.evaluate(
            "[...document.querySelectorAll('#patch-bytes tbody tr')]"
            ".map(row => [...row.cells].map(cell => cell.innerText))"
        )
        shown.append([(int(code, 16), float(entropy)) for _, code, entropy in rows])
    assert tab.text("#patch-title") == f"Patch {len(lengths)} of {len(lengths)}"
    assert [len(patch) for patch in shown] == lengths
    flat = [pair for patch in shown for pair in patch]
    assert bytes(byte for byte, _ in flat) == data
    expected = tiny.entropies(data)[: len(data)]
    assert [entropy for _, entropy in flat] == pytest.approx(list(map(float, expected)), abs=0.006)
    assert tab.complaints == []
    assert {re.match(r"\w+://[^/]*", url)[0] for url in tab.requests} == {server.url}  # type: ignore[index]


def test_figures_of_the_server(tab: Tab, scripted: ScriptedServer) -> None:
    generated(opened(tab, scripted.address), max_bytes=100)
    names = ("speed", "first", "new-bytes", "guesses", "per-patch")
    assert [tab.text(f"#{name}") for name in names] == ["500", "12.0 ms", "100", "31 of 40", "4.00"]
    stages = [line.split() for line in tab.text("#stage-list").splitlines() if "%" in line]
    assert [share for *_, share, _ in stages] == ["14", "14", "24", "28", "20"]  # of 0.212 s
    assert "29 of 116 bytes are above the threshold of 2.00" in tab.text("#entropy-summary")
    assert len(cells(tab, "guessed")) == 50  # the second half of every new patch
    assert tab.complaints == []


def test_whole_characters_of_many_scripts(tab: Tab, scripted: ScriptedServer) -> None:
    scripted.script.answer = MANY_SCRIPTS
    scripted.script.patch_lengths = (1, 2, 3, 5)  # cuts most characters
    generated(opened(tab, scripted.address), prompt="", max_bytes=len(MANY_SCRIPTS))
    shown = cells(tab)
    for whole in ("é", "👨‍👩‍👧", "人", "ي", "🇫🇷", "e\u0301", "\n", "\t"):
        assert whole in shown
    assert "".join(shown) == MANY_SCRIPTS.decode(errors="ignore").replace("\x07", "x07xff").replace(
        "end x07xff  ", "end x07xff xe4xba "
    ).replace("\u202e", "u202e")
    assert cells(tab, "raw") == ["x07", "xff", "xe4", "xba", "u202e"]
    assert "人" in cells(tab, "shared")
    assert tab.evaluate("document.querySelector('#text b')") is None
    assert tab.complaints == []


def test_cells_agree_with_another_utf8_decoder(tab: Tab, scripted: ScriptedServer) -> None:
    source = random.Random(5)
    leads = b"\x41\x80\xbf\xc0\xc2\xdf\xe0\xe4\xed\xef\xf0\xf4\xf5\xff\x9f\xa0\x8f"
    texts = [bytes([byte]) for byte in range(256)]
    texts += [bytes(source.choice(leads) for _ in range(source.randrange(12))) for _ in range(1500)]
    texts += [bytes(MANY_SCRIPTS[start : start + source.randrange(40)]) for start in range(len(MANY_SCRIPTS))]
    opened(tab, scripted.address)
    got = tab.evaluate(
        "import('/bytes.js').then(({ByteText}) => "
        + json.dumps([list(text) for text in texts])
        + ".map(bytes => { const text = new ByteText(); let at = 0;"
        " for (const byte of bytes) text.add({byte, position: at++, startsPatch: at % 3 == 1,"
        " entropy: null, guessed: false, isPrompt: false}); text.finish();"
        " return text.cells.map(c => [c.kind === 'invalid', c.first, c.count]); }))"
    )
    for text, found in zip(texts, got, strict=True):
        decoded = text.decode("utf-8", "surrogateescape")
        invalid = [False] * len(text)
        place = 0
        for character in decoded:
            if 0xDC80 <= ord(character) <= 0xDCFF:
                invalid[place] = True
            place += len(character.encode("utf-8", "surrogateescape"))
        # Every byte is in one cell, in order, and cells of invalid bytes are exactly the decoder's.
        ends = list(accumulate((count for *_, count in found), initial=0))
        assert [first for _, first, _ in found] == ends[:-1]
        assert ends[-1] == len(text)
        assert {first for bad, first, _ in found if bad} == {at for at, bad in enumerate(invalid) if bad}
        boundaries = {len(decoded[:at].encode("utf-8", "surrogateescape")) for at in range(len(decoded))}
        assert {first for _, first, _ in found} <= boundaries


def test_text_is_looked_at_by_pointing_and_picking(tab: Tab, scripted: ScriptedServer) -> None:
    generated(opened(tab, scripted.address), max_bytes=40)
    tab.hover(".cell", 17)  # byte 17 is in the fifth patch of four bytes
    assert tab.text("#patch-title") == "Patch 5 of 14"
    assert "“ther”, 4 bytes; begins here because" in tab.text("#patch-say")
    tab.hover("h1")
    assert tab.text("#patch-title") == "Patch"
    tab.click(".cell", 1)
    tab.hover("h1")
    assert tab.text("#patch-title") == "Patch 1 of 14"
    assert cells(tab, "on") == list("Once")
    tab.click("#unpin")
    assert cells(tab, "on") == []


# 2. What a person does.


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_keeps_what_came(tab: Tab, scripted: ScriptedServer, way: str) -> None:
    scripted.script.pause = 0.005
    opened(tab, scripted.address)
    tab.fill("#max-bytes", "5000")
    tab.click("#generate")
    tab.wait_for("document.querySelectorAll('.cell.full').length > 5")
    if way == "button":
        tab.click("#stop")
    else:
        tab.press("Escape")
    said = status(tab, "Stopped after")
    kept = len(cells(tab, "full"))
    assert said == f"Stopped after {kept} bytes."
    assert kept == new_bytes(tab)
    sent = -1
    while scripted.script.sent != sent:  # until the server has noticed; all of it would take 25 s
        sent = scripted.script.sent
        time.sleep(0.2)
    assert kept <= sent < 5000
    assert not tab.evaluate("document.querySelector('#generate').disabled")
    assert tab.complaints == []


def test_stop_before_the_first_byte_keeps_the_text_before(tab: Tab, scripted: ScriptedServer) -> None:
    generated(opened(tab, scripted.address), max_bytes=20)
    scripted.script.pause = 30
    tab.click("#generate")
    status(tab, "Reading")
    tab.press("Escape")
    status(tab, "Stopped before the first byte.")
    assert len(cells(tab)) == 36


def test_everything_by_keyboard(tab: Tab, scripted: ScriptedServer) -> None:
    opened(tab, scripted.address)
    seen = []
    for _ in range(16):
        tab.press("Tab")
        place, outline = tab.evaluate(
            "[document.activeElement.id || document.activeElement.parentElement.id,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        seen.append(place)
        assert outline == "solid"
        if place == "text":
            break
    options = ("max-bytes", "temperature", "top-p", "seed", "draft")
    assert seen == ["prompt", *["samples"] * 5, *options, "generate", "text"]
    for _ in range(len(seen) - 1):
        tab.press("Tab", SHIFT)
    tab.press("a", CONTROL)
    tab.type("The end")
    tab.press("Enter", CONTROL)
    status(tab, "Done")
    assert scripted.script.requests[-1]["prompt"] == "The end"
    tab.evaluate("document.querySelector('#generate').focus()")
    tab.press("Enter")
    status(tab, "Done")
    assert tab.evaluate("document.activeElement.id") == "generate"
    for place in ("copy", "continue", "text"):
        tab.press("Tab")
        assert tab.evaluate("document.activeElement.id") == place
    tab.press("End")
    tab.press("ArrowLeft")
    assert tab.text("#patch-title") == "Patch 61 of 62"
    assert tab.evaluate("document.querySelector('#patch-say').ariaLive") == "polite"
    tab.press("Escape")
    assert tab.text("#patch-title") == "Patch"


def test_options_and_continuing(tab: Tab, scripted: ScriptedServer) -> None:
    opened(tab, scripted.address)
    tab.evaluate("document.querySelector('#draft').value = 'lookup'")
    generated(tab, prompt="Hä", max_bytes=16, temperature=1.25, top_p=0.9, seed=11)
    asked = scripted.script.requests[-1]
    assert asked == {
        "model": "scripted",
        "prompt": "Hä",
        "max_tokens": 16,
        "temperature": 1.25,
        "top_p": 0.9,
        "seed": 11,
        "draft": "lookup",
        "stream": True,
        "stream_options": {"include_usage": True},
        "blt_details": True,
    }
    tab.fill("#seed", "")
    tab.click("#continue")
    status(tab, "Done")
    assert scripted.script.requests[-1]["prompt"] == "Hä" + "there was a king"
    assert "seed" not in scripted.script.requests[-1]
    tab.allow("clipboardReadWrite", "clipboardSanitizedWrite")
    tab.click("#copy")
    status(tab, "Copied 35 bytes")
    assert tab.evaluate("navigator.clipboard.readText()") == "Hä" + "there was a king" * 2


def test_an_option_out_of_range_is_not_sent(tab: Tab, scripted: ScriptedServer) -> None:
    opened(tab, scripted.address)
    tab.fill("#max-bytes", "0")
    tab.click("#generate")
    assert tab.evaluate("document.activeElement.id") == "max-bytes"
    assert scripted.script.requests == []


# 3. What a person is told when something is wrong.


def test_refusals_and_a_busy_server(tab: Tab, scripted: ScriptedServer) -> None:
    opened(tab, scripted.address)
    scripted.script.refusals = [(400, "temperature is 5000.0; allowed is 0 to 100", {})]
    tab.click("#generate")
    status(tab, "Temperature is 5000.0; allowed is 0 to 100.")
    scripted.script.refusals = [(429, "64 wait", {"Retry-After": "1"})]
    tab.click("#generate")
    status(tab, "The server is busy with other texts; asking again in 1.0 s.")
    status(tab, "Done: 240 bytes.")
    scripted.script.refusals = [(429, "64 wait", {"Retry-After": "30"})]
    tab.click("#generate")
    status(tab, "The server is busy")
    tab.press("Escape")
    status(tab, "Stopped before the first byte.")
    assert len(cells(tab, "full")) == 240


@pytest.mark.parametrize(
    ("fault", "said"), [("break_after", "The connection broke"), ("fail_after", "The model failed.")]
)
def test_a_stream_that_breaks_keeps_what_came(
    tab: Tab, scripted: ScriptedServer, fault: str, said: str
) -> None:
    setattr(scripted.script, fault, 20)
    opened(tab, scripted.address)
    tab.click("#generate")
    assert status(tab, said).endswith("20 bytes had come and are kept.")
    assert len(cells(tab, "full")) == 20


def test_a_server_that_is_gone(tab: Tab) -> None:
    with ScriptedServer() as server:
        generated(opened(tab, server.address), max_bytes=20)
    tab.click("#generate")
    status(tab, "The server does not answer. Is blt-edge serve still running?")
    assert len(cells(tab)) == 36
    assert not tab.evaluate("document.querySelector('#generate').disabled")


def test_a_server_with_a_key(tab: Tab, scripted: ScriptedServer) -> None:
    scripted.script.key = "s3cret"
    tab.open(scripted.address)
    tab.wait_for("document.querySelector('#key-dialog').open")
    tab.type("wrong")
    tab.press("Enter")
    tab.wait_for("!document.querySelector('#key-wrong').hidden")
    tab.type("s3cret")
    tab.press("Enter")
    tab.wait_for("document.querySelector('#model').value")
    generated(tab, max_bytes=10)
    scripted.script.key = "another"  # asked for again, and the text is made once it is there
    tab.click("#generate")
    tab.wait_for("document.querySelector('#key-dialog').open")
    tab.type("another")
    tab.press("Enter")
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
    for chosen in (False, True):
        if chosen:
            generated(tab, finger=True, prompt="W" * 200)
            tab.evaluate("document.querySelector('#text').scrollTo(0, 0)")
            tab.tap(".cell", 2)
            tab.wait_for("document.querySelectorAll('.on').length")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        wide = "[...document.querySelectorAll('body *:not(#samples *, .strip *, .unseen, option)')]"
        over = f"{wide}.filter(e => e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML)"
        assert tab.evaluate(over) == []
    box = tab.evaluate(
        "(b => [b.top, b.bottom])(document.querySelector('#inspector').getBoundingClientRect())"
    )
    assert 400 < box[0] < box[1] <= 844
    assert tab.evaluate("document.querySelector('.on').getBoundingClientRect().bottom") <= box[0]
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
    assert all(name in classes for name in ("h0", "h1", "h2", "h3", "pale", "full", "on", "raw", "wrong"))
    assert min(measured)[0] >= 4.5, min(measured)


def test_who_prefers_less_motion(tab: Tab, scripted: ScriptedServer) -> None:
    scripted.script.pause = 0.005
    opened(tab, scripted.address)
    tab.click("#generate")
    tab.wait_for("!!document.querySelector('.caret')")
    assert tab.evaluate("getComputedStyle(document.querySelector('.caret')).animationName") == "blink"
    tab.emulate(1200, 900, still=True)
    assert tab.evaluate("document.getAnimations().length") == 0


def test_what_a_screen_reader_has(tab: Tab, scripted: ScriptedServer) -> None:
    opened(tab, scripted.address)
    tab.evaluate(
        "(window.said = [], line => new MutationObserver(() => said.push(line.textContent))"
        ".observe(line, {childList: true}))(document.querySelector('#status'))"
    )
    generated(tab)
    assert tab.evaluate("said") == ["Reading the prompt…", "Generating…", "Done: 240 bytes."]
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "textbox", "spinbutton", "combobox", "region", "group", "image", "textarea"}
    for node in nodes:
        role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value")
        assert node.get("ignored") or role not in named or name, node
    assert sum(node.get("role", {}).get("value") == "button" for node in nodes) >= 9


def test_long_texts_stay_quick(tab: Tab, scripted: ScriptedServer) -> None:
    """20,000 bytes: the strip's canvas stays as wide as the page, and the end is in view."""
    generated(opened(tab, scripted.address), max_bytes=20_000)
    assert len(cells(tab)) == 20_016
    canvas, whole, end = tab.evaluate(
        "(s => [s.querySelector('canvas').width, s.scrollWidth, s.scrollLeft + s.clientWidth])"
        "(document.querySelector('#strip'))"
    )
    assert canvas <= 1200
    assert whole == pytest.approx(end, abs=2)
    assert whole > 200_000
    assert tab.evaluate(
        "(t => t.scrollTop + t.clientHeight >= t.scrollHeight - 2)(document.querySelector('#text'))"
    )


def test_files_hold_to_the_page_s_policy() -> None:
    """Nothing inline, nothing from elsewhere, nothing set as markup."""
    folder = resources.files("blt_edge.tools.server") / "page"
    files = {file.name: file.read_text() for file in folder.iterdir()}
    assert set(files) >= {"index.html", "page.css", "page.js", "icon.svg"}
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?! type=\"module\" src=)", files["index.html"])
    for name, text in files.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
