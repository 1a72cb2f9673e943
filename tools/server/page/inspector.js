// The patch that is looked at: its text, and each byte with its entropy.

import { byteLabel } from "./strip.js";
import { hex } from "./bytes.js";
import { HUES } from "./text_view.js";

const INVITATION = "Point at a patch, tap it, or walk through the text with the arrow keys.";

export class Inspector {
  constructor(root) {
    this._root = root;
    this._title = root.querySelector("h2");
    this._say = root.querySelector(".say");
    this._bytes = root.querySelector(".patch-bytes");
    this._close = root.querySelector("button");
    this.show(null, null);
  }

  /** Whether it lies over the page, as on a narrow screen. */
  get covers() {
    return getComputedStyle(this._root).position === "fixed";
  }

  /** Its upper edge on the screen, in pixels. */
  get top() {
    return this._root.getBoundingClientRect().top;
  }

  /**
   * Show patch `index` of `text` (null: nothing). `pinned` keeps a way to close it; `aloud` lets a screen
   * reader say it, which only a person who walks with the keys wants.
   */
  show(text, index, { threshold = null, pinned = false, aloud = false } = {}) {
    this._root.toggleAttribute("data-empty", index === null);
    this._close.hidden = index === null || !pinned;
    this._say.setAttribute("aria-live", aloud ? "polite" : "off");
    this._root.className = this._root.className.replace(/ ?\bh\d\b/, "");
    if (index === null) {
      this._title.textContent = "Patch";
      this._say.textContent = INVITATION;
      this._bytes.replaceChildren();
      return;
    }
    const { first, count } = text.patches[index];
    const bytes = text.bytes.slice(first, first + count);
    this._root.classList.add(`h${index % HUES}`);
    this._title.textContent = `Patch ${index + 1} of ${text.patches.length}`;
    this._say.textContent = described(text, index, bytes, threshold);
    this._bytes.replaceChildren(table(bytes, threshold));
  }
}

function described(text, index, bytes, threshold) {
  const said = JSON.stringify(text.patchText(index)).slice(1, -1).replaceAll("\\\\x", "\\x");
  const parts = [`\u201c${said}\u201d, ${bytes.length} ${bytes.length === 1 ? "byte" : "bytes"}`];
  const { entropy, isPrompt } = bytes[0];
  if (entropy !== null && threshold !== null && entropy > threshold) {
    parts.push(`begins here because its first byte was hard to foresee: ${entropy.toFixed(2)} nats`);
  }
  const guessed = bytes.filter((entry) => entry.guessed).length;
  if (isPrompt) parts.push("from your prompt");
  else if (guessed) parts.push(`${guessed} guessed ahead`);
  return `${parts.join("; ")}.`;
}

function table(bytes, threshold) {
  const element = document.createElement("table");
  const head = element.createTHead().insertRow();
  for (const [name, kind] of [["Byte", ""], ["Hex", ""], ["Entropy", "wide"]]) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.className = kind;
    cell.textContent = name;
    head.append(cell);
  }
  const body = element.createTBody();
  const top = Math.max(4, ...bytes.map((entry) => entry.entropy ?? 0));
  for (const entry of bytes) body.append(row(entry, top, threshold));
  return element;
}

function row(entry, top, threshold) {
  const line = document.createElement("tr");
  const name = line.insertCell();
  name.textContent = byteLabel(entry.byte);
  if (entry.guessed) name.className = "guessed";
  line.insertCell().textContent = hex(entry.byte);
  const cell = line.insertCell();
  cell.className = "wide";
  if (entry.entropy === null) {
    cell.textContent = "\u2013";
    return line;
  }
  const bar = document.createElement("span");
  bar.className = "tiny";
  bar.style.width = `${(100 * entry.entropy) / top}%`;
  const value = document.createElement("span");
  value.textContent = entry.entropy.toFixed(2);
  if (threshold !== null && entry.entropy > threshold) value.className = "over";
  const track = document.createElement("span");
  track.className = "track";
  track.append(bar);
  cell.append(value, track);
  return line;
}
