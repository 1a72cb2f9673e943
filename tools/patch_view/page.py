"""A cut text as one self-contained HTML page: no request leaves it, and without scripts it still shows all.

Each byte has a bar as high as its entropy, under the character it belongs to. Texts are untrusted: they reach
the page only escaped, as text or as numbers, and its own policy lets no script run but the one written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

from .page_parts import SCRIPT, STYLE
from .pieces import Piece
from .summary import counted, histogram_rows, summarize
from .tables import byte_rows
from .view import PatchView, rule_words

__all__ = ["html_page"]


def html_page(view: PatchView, name: str) -> str:
    """The page; name: of the model."""
    summary = summarize(view)
    level = "" if view.level is None else f' style="--t:{view.level / view.top:.4f}"'
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n',
            f"<title>Patches of {counted(summary)}</title>\n<style>{STYLE}</style>\n",
            f"<main><h1>{escape(name)}: {counted(summary)}</h1>\n",
            f"<p>A patch starts {rule_words(view.rule)}. {_explanation(view)}</p>\n",
            f"<section aria-labelledby=h2t><h2 id=h2t>Text</h2>\n"
            f'<div id=t tabindex=0 role=group dir=ltr translate=no lang="" aria-describedby=keys'
            f' aria-label="The text, byte by byte"{level}>',
            *_text(view),
            "</div>\n<p id=keys class=small>Point at a byte, or move with ← and → by bytes, ↑ and ↓ by "
            "patches, Home and End.</p></section>\n",
            _figures(view),
            "</main>\n<div id=info role=status aria-live=polite></div>\n",
            f'<script type="application/json" id=d>{_data(view)}</script>\n',
            f"<script>{SCRIPT}</script>\n</html>\n",
        ]
    )


def _explanation(view: PatchView) -> str:
    told = "Colours change where a patch starts"
    if view.entropies is not None:
        told += (
            "; the bar under each byte, and the strength of the colour, is the entropy before it, "
            f"0 to {view.top:.3g} nats"
        )
        if view.level is not None:
            told += ", and the line across is the threshold"
    if any(map(view.inner_starts, view.pieces)):
        told += "; a dashed line is a start inside a character"
    return told + "."


# 1. The text.


def _text(view: PatchView) -> Iterator[str]:
    """Patches that stay together where lines break, with their pieces; a line ends behind each newline."""
    numbered_pieces = zip(view.visible_patches, view.pieces, strict=True)
    for number, numbered in groupby(numbered_pieces, lambda pair: pair[0]):
        opened = False
        for _, piece in numbered:
            if not opened:
                yield f"<span class=k{number % 2}>"
            opened = True
            yield _piece(view, piece)
            if piece.text == "\n":
                yield "</span><br>"
                opened = False
        if opened:
            yield "</span>"


def _piece(view: PatchView, piece: Piece) -> str:
    classes = "".join([" s" * view.starts_with(piece), " e" * piece.escaped]).strip()
    named = f' class="{classes}"' if classes else ""
    entropy = view.entropy(piece)
    shade = "" if entropy is None else f' style="--e:{_share(view, entropy)}"'
    bars = "".join(_bar(view, piece, position) for position in range(piece.start, piece.end))
    return f"<b{named}{shade}><bdi>{escape(piece.shown)}</bdi><u>{bars}</u></b>"


def _bar(view: PatchView, piece: Piece, position: int) -> str:
    inner = " class=s" if position > piece.start and position in view.start_set else ""
    if view.entropies is None:
        return f"<i{inner}></i>"
    return f'<i{inner} style="--h:{_share(view, float(view.entropies[position]))}"></i>'


def _share(view: PatchView, entropy: float) -> str:
    share = min(max(entropy / view.top, 0.0), 1.0) if entropy == entropy else 0.0
    return f"{share:.3f}".rstrip("0").rstrip(".")


# 2. Figures, and what the script says of a byte.


def _figures(view: PatchView) -> str:
    summary = summarize(view)
    facts = [
        ("bytes a patch, mean", f"{summary.mean_length:.2f}"),
        ("median", f"{summary.median_length:g}"),
        ("longest", str(summary.longest)),
    ]
    if summary.mean_entropy is not None:
        facts.append(("mean entropy", f"{summary.mean_entropy:.3f} nats"))
    if summary.over_threshold is not None:
        what = "rises over the threshold" if view.rule.monotonic else "positions over the threshold"
        facts.append((what, f"{summary.over_threshold:.1%}"))
    listed = "".join(f"<div><dt>{name}<dd>{value}</div>" for name, value in facts)
    found = histogram_rows(summary)
    most = max(count for _, count in found)
    bars = "".join(
        f"<tr><th scope=row>{name}<td>{count:,}<td aria-hidden=true>"
        f'<s style="width:{100 * count / most:.1f}%"></s>'
        for name, count in found
    )
    return (
        f"<section aria-labelledby=h2f><h2 id=h2f>Figures</h2>\n<dl>{listed}</dl>\n"
        f"<table><thead><tr><th scope=col>bytes<th scope=col>patches<td></thead>{bars}</table></section>\n"
    )


def _data(view: PatchView) -> str:
    """[byte, character, entropy, patch, why a patch starts or null] of each byte, safe inside <script>."""
    columns = ("byte", "character", "entropy", "patch", "reason")
    rows = [[_known(row[column]) for column in columns] for row in byte_rows(view)]
    data = {"rows": rows, "lengths": view.lengths, "words": _REASONS}
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _known(value: Any) -> Any:
    """None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_REASONS = {
    "first": "as every text does",
    "entropy": "because of its entropy",
    "space": "because of the byte before it",
    "static": "because of its position",
    "byte": "as every byte does",
    "max_patch_length": "because the patch before it is full",
}
