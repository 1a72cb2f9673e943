// Bytes as they come, the characters they make, and the patches they lie in. Knows no DOM.
//
// A cell is what is shown as one thing: a whole character as a reader sees it (accents and joined emoji
// included), a control character, or a byte that is no part of one. Cells never cut a character, whatever
// patches its bytes lie in; bytes of a character that is not complete yet are in no cell.

const LONGEST_CELL = 64; // bytes; a letter under hundreds of accents is shown in pieces

/** How many bytes a UTF-8 character has that begins with `lead`; 0 when none does. */
function expectedLength(lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 0;
}

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const graphemes = globalThis.Intl?.Segmenter ? new Intl.Segmenter(undefined, { granularity: "grapheme" }) : null;

function decoded(bytes) {
  try {
    return decoder.decode(Uint8Array.from(bytes));
  } catch {
    return null;
  }
}

function kindOf(character) {
  if (character === "\n") return "newline";
  if (character === "\t") return "tab";
  // Controls, and what would move text around or be seen as nothing: directions, separators, tags.
  if (/^[\p{Cc}\p{Zl}\p{Zp}\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]$/u.test(character)) {
    return "control";
  }
  return "text";
}

/** A byte as hexadecimal digits. */
export function hex(byte) {
  return byte.toString(16).padStart(2, "0");
}

export class ByteText {
  constructor() {
    /** {byte, position, startsPatch, entropy (before this byte, nats, or null), guessed, isPrompt, patch} */
    this.bytes = [];
    /** {first, count}: bytes of each patch; the one that holds only the beginning of the text is not here */
    this.patches = [];
    /** {text, kind, first, count}: kind is text, newline, tab, control or invalid */
    this.cells = [];
    this._waiting = 0; // bytes at the end that are in no cell yet
  }

  /** Take one byte; returns the index of the first cell that is new or has changed. */
  add({ byte, position, startsPatch, entropy, guessed, isPrompt }) {
    if (startsPatch || this.patches.length === 0) this.patches.push({ first: this.bytes.length, count: 0 });
    const patch = this.patches.length - 1;
    this.patches[patch].count += 1;
    this.bytes.push({ byte, position, startsPatch, entropy, guessed, isPrompt, patch });
    const before = this.cells.length;
    this._waiting += 1;
    return Math.min(before, this._makeCells());
  }

  /** Nothing follows: show an incomplete character as bytes; returns as `add`. */
  finish() {
    const before = this.cells.length;
    while (this._waiting > 0) this._pushInvalid();
    return before;
  }

  /** Cells that show a byte of patch `index`: [first, last], or null when none does yet. */
  cellsOfPatch(index) {
    const { first, count } = this.patches[index];
    const from = this.cellOfByte(first);
    if (from === null) return null;
    return [from, this.cellOfByte(first + count - 1) ?? this.cells.length - 1];
  }

  /** What the bytes of patch `index` say; a part of a character as its bytes. */
  patchText(index) {
    const { first, count } = this.patches[index];
    let text = "";
    let at = first;
    while (at < first + count) {
      const length = expectedLength(this.bytes[at].byte);
      const end = at + Math.max(1, length);
      const piece = end <= first + count && length ? decoded(this._slice(at, end)) : null;
      text += piece ?? `\\x${hex(this.bytes[at].byte)}`;
      at += piece === null ? 1 : length;
    }
    return text;
  }

  _slice(from, to) {
    return this.bytes.slice(from, to).map((entry) => entry.byte);
  }

  /** Index of the cell that shows byte `index`, or null while none does. */
  cellOfByte(index) {
    let low = 0;
    let high = this.cells.length - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      const { first, count } = this.cells[middle];
      if (index < first) high = middle - 1;
      else if (index >= first + count) low = middle + 1;
      else return middle;
    }
    return null;
  }

  // Make cells of waiting bytes as far as it is certain what they are; returns the first one changed.
  _makeCells() {
    let changed = this.cells.length;
    while (this._waiting > 0) {
      const start = this.bytes.length - this._waiting;
      const expected = expectedLength(this.bytes[start].byte);
      const here = this._slice(start, start + Math.max(1, expected));
      const cut = here.findIndex((byte, at) => at > 0 && (byte & 0xc0) !== 0x80);
      if (expected && cut < 0 && here.length < expected) break; // it may still become a character
      const text = expected && cut < 0 ? decoded(here) : null;
      if (text === null) this._pushInvalid();
      else changed = Math.min(changed, this._pushCharacter(text, start, here.length));
    }
    return changed;
  }

  _pushInvalid() {
    const first = this.bytes.length - this._waiting;
    this.cells.push({ text: `x${hex(this.bytes[first].byte)}`, kind: "invalid", first, count: 1 });
    this._waiting -= 1;
  }

  _pushCharacter(text, first, count) {
    this._waiting -= count;
    const kind = kindOf(text);
    const last = this.cells.at(-1);
    if (kind === "text" && text > "\x7f" && last && this._joins(last, text, first, count)) {
      last.text += text;
      last.count += count;
      return this.cells.length - 1;
    }
    const shown = kind === "control" ? shownControl(text) : text;
    this.cells.push({ text: shown, kind, first, count });
    return this.cells.length - 1;
  }

  _joins(last, text, first, count) {
    if (last.kind !== "text" || last.count + count > LONGEST_CELL || graphemes === null) return false;
    if (this.bytes[last.first].isPrompt !== this.bytes[first].isPrompt) return false;
    const pieces = graphemes.segment(last.text + text)[Symbol.iterator]();
    pieces.next();
    return pieces.next().done;
  }
}

function shownControl(character) {
  const code = character.codePointAt(0);
  return code < 0x100 ? `x${hex(code)}` : `u${code.toString(16).padStart(4, "0")}`;
}
