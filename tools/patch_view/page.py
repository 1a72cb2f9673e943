"""A cut text as one self-contained HTML page: no request leaves it, and without scripts it still shows all.

Each byte has a bar as high as its entropy, under the character it belongs to. Texts are untrusted: they reach
the page only escaped, as text or as numbers, and its own policy lets no script run but the one written here.
`page.js` knows a text only from the page's elements and data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from html import escape
from importlib import resources
from itertools import groupby

from .clusters import Cluster
from .view import PatchView, byte_rows, histogram_rows, rule_words, summarize


def html_page(view: PatchView, name: str) -> str:
    """The page; name: of the model."""
    style, script = (
        resources.files(__package__).joinpath(file).read_text("utf-8") for file in ("page.css", "page.js")
    )
    summary = summarize(view)
    level = "" if view.level is None else f' style="--t:{view.level / view.top:.4f}"'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n',
            f"<title>Patches of {summary}</title>\n<style>{style}</style>\n",
            f"<main><h1>{escape(name)}: {summary}</h1>\n",
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
            f"<script>{script}</script>\n</html>\n",
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
    if view.has_inner_starts:
        told += "; a dashed line is a start inside a character"
    return told + "."


# 1. The text.


def _text(view: PatchView) -> Iterator[str]:
    """Patches that stay together where lines break, with their clusters; a line ends behind each newline."""
    numbered_clusters = zip(view.visible_patches, view.clusters, strict=True)
    for number, numbered in groupby(numbered_clusters, lambda pair: pair[0]):
        opened = False
        for _, cluster in numbered:
            if not opened:
                yield f"<span class=k{number % 2}>"
            opened = True
            yield _cluster(view, cluster)
            if cluster.text == "\n":
                yield "</span><br>"
                opened = False
        if opened:
            yield "</span>"


def _cluster(view: PatchView, cluster: Cluster) -> str:
    classes = "".join([" s" * view.starts_with(cluster), " e" * cluster.escaped]).strip()
    named = f' class="{classes}"' if classes else ""
    entropy = view.entropy(cluster)
    shade = "" if entropy is None else f' style="--e:{_share(view, entropy)}"'
    bars = []
    for position in range(cluster.start, cluster.end):
        inner = " class=s" if position > cluster.start and position in view.start_set else ""
        height = ""
        if view.entropies is not None:
            height = f' style="--h:{_share(view, float(view.entropies[position]))}"'
        bars.append(f"<i{inner}{height}></i>")
    return f"<b{named}{shade}><bdi>{escape(cluster.shown)}</bdi><u>{''.join(bars)}</u></b>"


def _share(view: PatchView, entropy: float) -> str:
    return f"{view.share(entropy):.3f}".rstrip("0").rstrip(".")


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


_REASONS = {
    "first": "as every text does",
    "entropy": "because of its entropy",
    "space": "because of the byte before it",
    "static": "because of its position",
    "byte": "as every byte does",
    "max_patch_length": "because the patch before it is full",
}


def _data(view: PatchView) -> str:
    """[byte, character, entropy, patch, why a patch starts or null] of each byte, safe inside <script>."""
    rows = []
    for row in byte_rows(view):
        entropy = row["entropy"]
        if entropy is not None and not math.isfinite(entropy):  # JSON has no word for it
            entropy = None
        rows.append([row["byte"], row["character"], entropy, row["patch"], row["reason"]])
    data = {"rows": rows, "lengths": view.lengths, "words": _REASONS}
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
