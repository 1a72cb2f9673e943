"""A cut text as one self-contained HTML page: no request leaves it, and without scripts it still shows all.

Each byte has a bar as high as its entropy, under the character it belongs to. Texts are untrusted: they reach
the page only escaped, as text or as numbers, and its own policy lets no script run but the one written here.
The script knows a text only from the page's elements and data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from html import escape
from itertools import groupby

from .clusters import Cluster
from .view import PatchView, byte_rows, histogram_rows, rule_words, summarize

STYLE = """
:root{--back:#fff;--text:#1b1f24;--grey:#59636e;--rule:#d0d7de;--a:38 110 200;--b:214 110 10;--line:#c8102e;
--low:.1;--high:.62}
@media (prefers-color-scheme:dark){:root{--back:#0f1318;--text:#e8ecf1;--grey:#9aa5b1;--rule:#333b45;
--a:70 140 235;--b:235 135 40;--line:#ff6b6b;--low:.14;--high:.6}}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:75rem;margin:0 auto;padding:1rem 1rem 7rem}
h1{font-size:1.25rem;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.3rem 0}.small{font-size:.85rem;color:var(--grey)}
#t{font:1rem/1.35 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;border-radius:4px}
#t:focus-visible{outline:2px solid var(--grey);outline-offset:4px}
#t span{display:inline-block;max-width:100%;vertical-align:top;margin-bottom:.45rem}
.k0{--k:var(--a)}.k1{--k:var(--b)}
#t b{display:inline-flex;flex-direction:column;vertical-align:top;font-weight:inherit;min-width:1ch;
background:rgb(var(--k)/calc(var(--low) + (var(--high) - var(--low))*var(--e,.4)))}
#t bdi{text-align:center;white-space:pre;padding:1px 0}
.e bdi{font-style:italic;opacity:.75}
#t b.s{box-shadow:inset 1px 0 var(--text)}
u{display:flex;height:2.2rem;align-items:flex-end;text-decoration:none;background:linear-gradient(to top,
transparent calc(100%*var(--t,2)),var(--line) calc(100%*var(--t,2)),var(--line) calc(100%*var(--t,2) + 1px),
transparent 0) var(--back)}
i{flex:1;min-width:5px;height:100%;background:linear-gradient(to top,rgb(var(--k)/.85) calc(100%*var(--h,0)),
transparent 0)}
u .s{border-left:1px dashed var(--text)}
i.on{outline:2px solid var(--text);outline-offset:-1px}
dl{display:flex;flex-wrap:wrap;gap:.3rem 2rem;margin:0}dt{font-size:.85rem;color:var(--grey)}dd{margin:0}
table{border-collapse:collapse;margin-top:.6rem;font-variant-numeric:tabular-nums;width:100%;max-width:32rem}
th,td{text-align:right;padding:0 .8rem 0 0;font-weight:inherit;white-space:nowrap}
thead{font-size:.85rem;color:var(--grey)}td:last-child{width:100%}
s{display:block;height:.75rem;background:rgb(var(--a)/.8);min-width:1px}
#info{position:fixed;inset:auto 0 0;padding:.5rem 1rem;background:var(--back);
border-top:1px solid var(--rule);
font-size:.95rem;overflow-wrap:anywhere}#info:empty{display:none}
"""

SCRIPT = """
"use strict";
const text = document.getElementById("t"), info = document.getElementById("info");
const data = JSON.parse(document.getElementById("d").textContent), rows = data.rows;
const bars = Array.from(text.querySelectorAll("i")), places = new Map(bars.map((bar, at) => [bar, at]));
const begins = [];
rows.forEach((row, at) => { if (row[4]) begins.push(at); });
let current = -1;
const visible = c => c === null ? "no UTF-8" : /^[\\x21-\\x7e\\u00a1-\\u{10ffff}]$/u.test(c) &&
  !/\\p{C}|\\p{Z}/u.test(c) ? c : "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
function show(at) {
  if (at < 0 || at >= rows.length) return;
  if (bars[current]) bars[current].classList.remove("on");
  current = at;
  bars[at].classList.add("on");
  const [byte, character, entropy, patch, reason] = rows[at], begin = begins[patch - 1];
  // The isolates keep a letter of another direction from turning what is said of it.
  const parts = ["position " + at + ": byte 0x" + byte.toString(16).padStart(2, "0") + " (\\u2068" +
    visible(character) + "\\u2069)"];
  if (entropy !== null) parts.push("entropy " + entropy.toFixed(3) + " nats");
  parts.push("patch " + patch + ", its byte " + (at - begin + 1) + " of " + data.lengths[patch - 1]);
  if (reason) parts.push("a patch starts here, " + data.words[reason]);
  info.textContent = parts.join(" \\u00b7 ");
}
function at(target) {
  if (places.has(target)) return places.get(target);
  const cluster = target.closest && target.closest("#t b");
  return cluster ? places.get(cluster.querySelector("i")) : -1;
}
function go(to) {
  show(Math.min(Math.max(to, 0), rows.length - 1));
  bars[current].scrollIntoView({block: "nearest"});
}
function patch(step) {
  if (current < 0) return 0;
  const index = rows[current][3] - 1;
  if (step < 0 && current > begins[index]) return begins[index];
  const to = index + step;
  return to < 0 ? 0 : to < begins.length ? begins[to] : rows.length - 1;
}
text.addEventListener("pointerover", event => show(at(event.target)));
text.addEventListener("click", event => show(at(event.target)));
text.addEventListener("focus", () => { if (current < 0) show(0); });
text.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const to = {ArrowRight: () => current + 1, ArrowLeft: () => current - 1, ArrowDown: () => patch(1),
    ArrowUp: () => patch(-1), Home: () => 0, End: () => rows.length - 1}[event.key];
  if (to) { event.preventDefault(); go(to()); }
});
"""


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
            f"<title>Patches of {summary}</title>\n<style>{STYLE}</style>\n",
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
