// The figures beside the text: what can be counted here while it comes, then what the server has measured.

const STAGES = {
  patcher: "marks patches",
  encoder: "reads bytes",
  latent: "reads patches",
  decoder: "writes bytes",
  other: "everything else",
};

export class Figures {
  constructor(root) {
    this._at = (id) => root.querySelector(`#${id}`);
    this.clear();
  }

  clear() {
    for (const id of ["speed", "first", "per-patch", "new-bytes", "patches", "guesses"]) this._put(id, "\u2013");
    this._at("stage-bar").replaceChildren();
    this._note("Known when a text has ended.");
  }

  /** What is seen here: `text` (a ByteText), and seconds from the request to the first byte and to now. */
  live(text, firstSeconds, seconds) {
    const fresh = text.bytes.reduce((count, entry) => count + !entry.isPrompt, 0);
    this._put("new-bytes", whole(fresh));
    this._put("patches", whole(text.patches.length));
    this._put("per-patch", text.patches.length ? (text.bytes.length / text.patches.length).toFixed(2) : "\u2013");
    if (firstSeconds === null) return;
    this._put("first", duration(firstSeconds));
    const decoding = seconds - firstSeconds;
    if (fresh > 1 && decoding > 0.05) this._put("speed", rate((fresh - 1) / decoding));
  }

  /** What the server has measured. */
  final(stats) {
    this._put("new-bytes", whole(stats.new_bytes));
    if (stats.bytes_per_second > 0) this._put("speed", rate(stats.bytes_per_second));
    this._put("first", duration(stats.first_byte_seconds));
    this._put("guesses", stats.drafted ? `${whole(stats.accepted)} of ${whole(stats.drafted)}` : "none made");
    this._stages(stats);
  }

  /** The text ended without the server's figures. */
  unfinished() {
    this._note("A stopped text has no times by stage.");
  }

  _stages(stats) {
    const known = Object.entries(stats.stage_seconds ?? {});
    const inside = known.reduce((sum, [, seconds]) => sum + seconds, 0);
    const whole = Math.max(inside, (stats.prefill_seconds ?? stats.first_byte_seconds) + stats.decode_seconds);
    const shares = [...known, ["other", whole - inside]];
    const bar = this._at("stage-bar");
    const list = this._at("stage-list");
    bar.replaceChildren();
    list.replaceChildren();
    for (const [name, seconds] of shares) {
      const share = whole > 0 ? seconds / whole : 0;
      const part = document.createElement("span");
      part.className = `stage ${name}`;
      part.style.flexGrow = String(Math.max(share, 0.0001));
      bar.append(part);
      list.append(stageLine(name, seconds, share));
    }
  }

  _note(line) {
    const item = document.createElement("li");
    item.className = "note";
    item.textContent = line;
    this._at("stage-list").replaceChildren(item);
  }

  _put(id, value) {
    this._at(id).textContent = value;
  }
}

function stageLine(name, seconds, share) {
  const item = document.createElement("li");
  const swatch = document.createElement("span");
  swatch.className = `swatch stage ${name}`;
  swatch.setAttribute("aria-hidden", "true");
  const label = document.createElement("span");
  label.className = "name";
  label.textContent = name;
  const what = document.createElement("span");
  what.className = "what";
  what.textContent = STAGES[name] ?? "";
  const value = document.createElement("span");
  value.className = "value";
  value.textContent = `${(100 * share).toFixed(0)} %`;
  value.title = duration(seconds);
  item.append(swatch, label, what, value);
  return item;
}

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds < 0.0995) return `${(1000 * seconds).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${(1000 * seconds).toFixed(0)} ms`;
  return seconds < 99.5 ? `${seconds.toFixed(1)} s` : `${whole(seconds)} s`;
}

function rate(value) {
  return value < 99.5 ? value.toFixed(1) : whole(value);
}

/** A whole number with its thousands apart. */
export function whole(value) {
  return Math.round(value).toLocaleString("en");
}
