"use strict";
const text = document.getElementById("t"), info = document.getElementById("info");
const data = JSON.parse(document.getElementById("d").textContent), rows = data.rows;
const bars = Array.from(text.querySelectorAll("i")), places = new Map(bars.map((bar, at) => [bar, at]));
const begins = [];
rows.forEach((row, at) => { if (row[4]) begins.push(at); });
let current = -1;
const visible = c => c === null ? "no UTF-8" : /^[\x21-\x7e\u00a1-\u{10ffff}]$/u.test(c) &&
  !/\p{C}|\p{Z}/u.test(c) ? c : "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
function show(at) {
  if (at < 0 || at >= rows.length) return;
  if (bars[current]) bars[current].classList.remove("on");
  current = at;
  bars[at].classList.add("on");
  const [byte, character, entropy, patch, reason] = rows[at], begin = begins[patch - 1];
  // The isolates keep a letter of another direction from turning what is said of it.
  const parts = ["position " + at + ": byte 0x" + byte.toString(16).padStart(2, "0") + " (\u2068" +
    visible(character) + "\u2069)"];
  if (entropy !== null) parts.push("entropy " + entropy.toFixed(3) + " nats");
  parts.push("patch " + patch + ", its byte " + (at - begin + 1) + " of " + data.lengths[patch - 1]);
  if (reason) parts.push("a patch starts here, " + data.words[reason]);
  info.textContent = parts.join(" \u00b7 ");
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
