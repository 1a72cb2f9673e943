// The entropy strip: a bar per byte over its character, a line at the threshold, scrolling with the text.
//
// Only what is in view is drawn, so its length has no limit.

import { hex } from "./bytes.js";
import { HUES } from "./text_view.js";

const PITCH = 11; // pixels a byte
const BARS = 84; // pixels of the highest bar
const LETTERS = 22; // pixels for the characters below
const HEADROOM = 10;

export class Strip {
  /** `root` scrolls; in it lie a space as wide as the text and, stuck to the left, a canvas. */
  constructor(root, onPatch) {
    this._root = root;
    this._space = root.querySelector(".strip-space");
    this._canvas = root.querySelector("canvas");
    this._onPatch = onPatch;
    this._marked = null;
    this.threshold = null;
    this.clear(null);
    root.addEventListener("scroll", () => this.draw());
    root.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") this._point(event, "hover");
    });
    root.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") this._onPatch(null, { how: "hover" });
    });
    root.addEventListener("click", (event) => this._point(event, "pick"));
    new ResizeObserver(() => this.draw()).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Show `text` (a ByteText) from now on. */
  clear(text) {
    this._text = text;
    this._marked = null;
    this._highest = 0;
    this._seen = 0;
    this._root.scrollLeft = 0;
    this.update();
  }

  /** The text has grown. */
  update() {
    const bytes = this._text?.bytes ?? [];
    for (; this._seen < bytes.length; this._seen += 1) {
      this._highest = Math.max(this._highest, bytes[this._seen].entropy ?? 0);
    }
    const root = this._root;
    const following = root.scrollLeft + root.clientWidth >= root.scrollWidth - 2 * PITCH;
    this._space.style.width = `${bytes.length * PITCH}px`;
    if (following) root.scrollLeft = root.scrollWidth;
    this.draw();
  }

  /** Highlight patch `index` (null: none); `scroll` brings it into view. */
  mark(index, { scroll = false } = {}) {
    this._marked = index;
    if (index !== null && scroll) {
      const { first, count } = this._text.patches[index];
      const [left, right] = [first * PITCH, (first + count) * PITCH];
      const root = this._root;
      if (left < root.scrollLeft) root.scrollLeft = left - 4 * PITCH;
      if (right > root.scrollLeft + root.clientWidth) root.scrollLeft = right - root.clientWidth + 4 * PITCH;
    }
    this.draw();
  }

  /** In words, what the strip shows. */
  summary() {
    const bytes = this._text?.bytes ?? [];
    const known = bytes.filter((entry) => entry.entropy !== null);
    if (known.length === 0) return "";
    const mean = known.reduce((sum, entry) => sum + entry.entropy, 0) / known.length;
    const peak = known.reduce((best, entry) => (entry.entropy > best.entropy ? entry : best));
    let line = `${mean.toFixed(2)} on average, ${peak.entropy.toFixed(2)} at most`;
    if (this.threshold !== null) {
      const over = known.filter((entry) => entry.entropy > this.threshold).length;
      line += `; ${over} of ${known.length} bytes are above the threshold of ${this.threshold.toFixed(2)}`;
    }
    return `${line}.`;
  }

  draw() {
    const canvas = this._canvas;
    const width = this._root.clientWidth;
    const height = HEADROOM + BARS + LETTERS;
    const scale = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    if (!this._text) return;
    const style = getComputedStyle(this._root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const top = Math.max(4, Math.ceil(this._highest));
    const base = HEADROOM + BARS;
    this._drawBars(pen, colour, { width, base, perNat: BARS / top });
    this._drawLetters(pen, colour, { width, base });
    pen.fillStyle = colour("--line");
    pen.fillRect(0, base, width, 1);
    if (this.threshold !== null) this._drawThreshold(pen, colour, base - (this.threshold * BARS) / top);
  }

  _range(width) {
    const from = Math.max(0, Math.floor(this._root.scrollLeft / PITCH));
    return [from, Math.min(this._text.bytes.length, from + Math.ceil(width / PITCH) + 2)];
  }

  _drawBars(pen, colour, { width, base, perNat }) {
    const bars = Array.from({ length: HUES }, (_, hue) => colour(`--bar${hue}`));
    const [from, to] = this._range(width);
    for (let index = from; index < to; index += 1) {
      const entry = this._text.bytes[index];
      const left = index * PITCH - this._root.scrollLeft;
      if (entry.patch === this._marked) {
        pen.fillStyle = colour("--mark");
        pen.fillRect(left, 0, PITCH, base + LETTERS);
      }
      if (entry.entropy === null) continue;
      const tall = Math.max(1, entry.entropy * perNat);
      pen.globalAlpha = entry.isPrompt ? 0.55 : 1;
      pen.fillStyle = bars[entry.patch % HUES];
      pen.fillRect(left + 1, base - tall, PITCH - 2, tall);
      pen.globalAlpha = 1;
    }
  }

  _drawLetters(pen, colour, { width, base }) {
    const [from, to] = this._range(width);
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillStyle = colour("--muted");
    const cells = this._text.cells;
    let at = this._text.cellOfByte(from) ?? cells.length;
    for (; at < cells.length && cells[at].first < to; at += 1) {
      const cell = cells[at];
      const wide = cell.count * PITCH;
      const label = cell.kind === "text" ? (cell.text === " " ? "\u00b7" : cell.text) : LABELS[cell.kind];
      if (!label) continue;
      pen.font = `12px ${colour("--mono")}`;
      pen.fillText(label, cell.first * PITCH - this._root.scrollLeft + wide / 2, base + LETTERS / 2 + 1, wide + 4);
    }
  }

  _drawThreshold(pen, colour, y) {
    const width = this._root.clientWidth;
    pen.strokeStyle = colour("--ink");
    pen.lineWidth = 1;
    pen.setLineDash([3, 3]);
    pen.beginPath();
    pen.moveTo(0, Math.round(y) + 0.5);
    pen.lineTo(width, Math.round(y) + 0.5);
    pen.stroke();
    pen.setLineDash([]);
  }

  _point(event, how) {
    if (!this._text) return;
    const x = event.clientX - this._root.getBoundingClientRect().left + this._root.scrollLeft;
    const entry = this._text.bytes[Math.floor(x / PITCH)];
    this._onPatch(entry ? entry.patch : null, { how });
  }
}

const LABELS = { newline: "\u21b5", tab: "\u2192", control: "\u25a1", invalid: "\u25a1" };

/** A byte's own label where it stands alone: the character if it is one, else hexadecimal digits. */
export function byteLabel(byte) {
  if (byte === 0x20) return "space";
  if (byte > 0x20 && byte < 0x7f) return String.fromCharCode(byte);
  return { 0x0a: "newline", 0x09: "tab", 0x0d: "return" }[byte] ?? `x${hex(byte)}`;
}
