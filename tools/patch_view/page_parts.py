"""The style and the script of `page`'s pages, which know a text only from the page's elements and data."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

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
  const piece = target.closest && target.closest("#t b");
  return piece ? places.get(piece.querySelector("i")) : -1;
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
