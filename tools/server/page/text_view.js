// The text, coloured by patch: cells of a ByteText as elements, and the patch that is looked at.

export const HUES = 4;

const RIGHT_TO_LEFT = /\p{Script=Arabic}|\p{Script=Hebrew}|\p{Script=Syriac}|\p{Script=Thaana}|\p{Script=Nko}/u;

export class TextView {
  /** `root` shows the text; `onPatch(index or null, {how})` is told what is looked at: hover, pick or keys. */
  constructor(root, onPatch) {
    this._root = root;
    this._onPatch = onPatch;
    this._caret = document.createElement("span");
    this._caret.className = "caret";
    this._caret.setAttribute("aria-hidden", "true");
    this._marked = [];
    this.clear(null);
    root.addEventListener("pointerover", (event) => this._hover(event));
    root.addEventListener("pointerleave", (event) => this._leave(event));
    root.addEventListener("click", (event) => this._pick(event));
  }

  /** Show `text` (a ByteText) from now on, empty so far. */
  clear(text) {
    this._text = text;
    this._spans = [];
    this._marked = [];
    this._root.replaceChildren();
  }

  /** Whether more is to come, shown by a caret. */
  set running(value) {
    if (value) this._root.append(this._caret);
    else this._caret.remove();
    this._root.setAttribute("aria-busy", String(value));
  }

  /** Say after the last cell why it is the last; "": nothing. */
  end(why) {
    if (!why) return;
    const mark = document.createElement("span");
    mark.className = "ending";
    mark.textContent = why;
    this._root.append(mark);
    this._root.scrollTop = this._root.scrollHeight;
  }

  /** Draw cells from index `from` on, and stay at the end if that is where the reader is. */
  update(from) {
    const root = this._root;
    const following = root.scrollTop + root.clientHeight >= root.scrollHeight - 24;
    const added = document.createDocumentFragment();
    for (let index = from; index < this._text.cells.length; index += 1) {
      if (index < this._spans.length) this._dress(this._spans[index], index);
      else {
        const span = document.createElement("span");
        this._dress(span, index);
        this._spans.push(span);
        added.append(span);
      }
    }
    if (this._caret.parentNode === root) root.insertBefore(added, this._caret);
    else root.append(added);
    if (following) root.scrollTop = root.scrollHeight;
  }

  /** Highlight patch `index` (null: none); `scroll` brings it into view. */
  mark(index, { scroll = false } = {}) {
    for (const span of this._marked) span.classList.remove("on");
    this._marked = [];
    const range = index === null ? null : this._text.cellsOfPatch(index);
    if (range === null) return;
    this._marked = this._spans.slice(range[0], range[1] + 1);
    for (const span of this._marked) span.classList.add("on");
    if (scroll) this._marked[0]?.scrollIntoView({ block: "nearest" });
  }

  /** Where the highlighted patch ends on the screen, in pixels from its top; 0 when none is. */
  get markedBottom() {
    return this._marked.at(-1)?.getBoundingClientRect().bottom ?? 0;
  }

  _dress(span, index) {
    const cell = this._text.cells[index];
    const bytes = this._text.bytes.slice(cell.first, cell.first + cell.count);
    const names = ["cell", `h${bytes[0].patch % HUES}`, bytes[0].isPrompt ? "pale" : "full"];
    if (cell.kind !== "text") names.push(cell.kind === "invalid" ? "raw" : cell.kind === "control" ? "raw" : cell.kind);
    if (bytes[0].startsPatch || cell.first === 0) names.push("first");
    if (bytes.every((entry) => entry.guessed)) names.push("guessed");
    if (RIGHT_TO_LEFT.test(cell.text)) names.push("rtl");
    if (bytes.some((entry) => entry.patch !== bytes[0].patch)) {
      names.push("shared");
      span.style.backgroundImage = shares(bytes);
    } else if (span.style.backgroundImage) span.style.backgroundImage = "";
    span.className = names.join(" ");
    span.dataset.cell = index;
    span.textContent = cell.text;
  }

  _patchAt(event) {
    const span = event.target.closest?.(".cell");
    if (!span || !this._root.contains(span)) return null;
    const cell = this._text.cells[Number(span.dataset.cell)];
    // In a character that several patches share, the pointer's place says which one is meant.
    const box = span.getBoundingClientRect();
    const share = Math.min(0.999, Math.max(0, (event.clientX - box.left) / box.width || 0));
    return this._text.bytes[cell.first + Math.floor(share * cell.count)].patch;
  }

  // A finger points at nothing before it picks.
  _hover(event) {
    if (event.pointerType !== "mouse") return;
    const patch = this._patchAt(event);
    if (patch !== null) this._onPatch(patch, { how: "hover" });
  }

  _leave(event) {
    if (event.pointerType === "mouse") this._onPatch(null, { how: "hover" });
  }

  _pick(event) {
    if (!getSelection().isCollapsed) return; // it was a selection of text
    this._onPatch(this._patchAt(event), { how: "pick" });
  }
}

// Stripes of the patches that share a character, as wide as their parts of its bytes.
function shares(bytes) {
  const stops = bytes.map((entry, at) => {
    const name = `--${entry.isPrompt ? "pale" : "full"}${entry.patch % HUES}`;
    return `var(${name}) ${(100 * at) / bytes.length}% ${(100 * (at + 1)) / bytes.length}%`;
  });
  return `linear-gradient(to right, ${stops.join(", ")})`;
}
