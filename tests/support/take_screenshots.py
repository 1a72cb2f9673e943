"""Take docs/images/page-*.png: the page of `blt-edge serve` in Chromium, after real generations.

    python tests/support/take_screenshots.py demo-bundle

Needs Chromium and fonts (Debian: chromium fonts-noto-core fonts-noto-cjk fonts-noto-color-emoji
fonts-dejavu-core), and Pillow, which matplotlib brings.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image
from support.browser import Browser, BrowserError, Tab, find_chromium
from support.chat import MAIN

IMAGES = Path(__file__).parents[2] / "docs" / "images"


@dataclass(frozen=True)
class Picture:
    name: str
    width: int
    height: int
    prompt: str
    patch: int
    """Index of the patch that is looked at."""
    max_bytes: int = 240
    dark: bool = False
    phone: bool = False


PICTURES = (
    Picture("page-light.png", 1200, 1000, "Once upon a time", 12),
    Picture("page-dark.png", 1200, 1000, "Once upon a time", 12, dark=True),
    Picture("page-phone.png", 390, 844, "All human beings are born", 9, max_bytes=160, phone=True),
)


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server that runs meanwhile. Raises BrowserError when it does not start."""
    command = [sys.executable, "-c", MAIN, "serve", "-m", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            if not address:
                raise BrowserError("blt-edge serve did not start")
            yield f"{address}/"
        finally:
            server.terminate()


def generate(tab: Tab, address: str, picture: Picture) -> None:
    tab.emulate(picture.width, picture.height, dark=picture.dark, phone=picture.phone)
    tab.open(address)
    tab.wait_for("document.querySelector('#model').value")
    fields = {"prompt": picture.prompt, "seed": 7, "max-bytes": picture.max_bytes, "temperature": 0.7}
    for name, value in fields.items():
        tab.fill(f"#{name}", str(value))
    tab.click("#generate")
    tab.wait_for("document.querySelector('#status').innerText.startsWith('Done')", 120)


def take(tab: Tab, address: str, picture: Picture, path: Path) -> None:
    """Generate, look at a patch, and write a PNG."""
    generate(tab, address, picture)
    tab.evaluate("document.querySelector('#text').focus({preventScroll: true})")
    for _ in range(picture.patch + 1):
        tab.press("ArrowRight")
    tab.evaluate("document.activeElement.blur()")
    tab.move_to(1, 1)
    top = ".actions" if picture.phone else "body"
    tab.evaluate(f"document.querySelector('{top}').scrollIntoView({{block: 'start'}})")
    tab.draw()
    tab.save_screenshot(path)
    with Image.open(path) as image:  # down to 256 colours, a third of the size
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the pictures of the page.")
    parser.add_argument("bundle", type=Path, help="what to serve")
    parser.add_argument("-o", "--output", type=Path, default=IMAGES, help="folder of the pictures")
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        print("there is no Chromium; on Debian: apt-get install chromium", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        with served(options.bundle) as address, Browser(program) as browser:
            with browser.tab() as tab:  # so that the server knows what guessing costs here
                generate(tab, address, PICTURES[0])
            for picture in PICTURES:
                path = options.output / picture.name
                with browser.tab() as tab:
                    take(tab, address, picture, path)
                print(f"{path}: {path.stat().st_size:,} bytes")
    except BrowserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
