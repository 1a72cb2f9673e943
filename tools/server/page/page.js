// The page: a prompt goes to the server, its continuation comes back byte by byte and is shown in patches.
//
// Whatever the model or the server says is set as text, never as markup. Nothing is kept but the key, in
// this tab's session storage.

import { ByteText } from "./bytes.js";
import { Figures, duration, whole } from "./figures.js";
import { Inspector } from "./inspector.js";
import { complete, models, RequestError } from "./stream.js";
import { Strip } from "./strip.js";
import { TextView } from "./text_view.js";

const KEY = "blt-edge key";
const BUSY_TRIES = 6;
const LOOK_AFTER = 400; // milliseconds without a key pressed
const LOOK_AT_MOST = 1000; // characters

const at = (id) => document.getElementById(id);

const view = new TextView(at("text"), look);
const strip = new Strip(at("strip"), look);
const inspector = new Inspector(at("inspector"));
const figures = new Figures(document);

/**
 * The text on the page. `run` is null, or the AbortController of what is coming in; `fresh` is whether
 * anything of it has come: until then the text before stays, and it stays if nothing comes. `made` is whether
 * a text was ever made: before, what is shown is the prompt, and `looking` the AbortController of reading it.
 */
const state = {
  run: null,
  fresh: false,
  made: false,
  looking: null,
  text: null,
  prompt: "",
  most: 0,
  answer: "",
  reason: null,
  stats: null,
  started: 0,
  firstAt: null,
  pinned: null,
  drawFrom: Infinity,
  modelDetails: new Map(),
};

// 1. A generation.

async function generate(prompt) {
  if (state.run) return;
  state.looking?.abort();
  const run = new AbortController();
  state.run = run;
  state.fresh = false;
  state.started = performance.now();
  say("Reading the prompt\u2026");
  setRunning(true);
  let said;
  try {
    await completeWhenFree(request(prompt), run.signal);
    said = ended();
  } catch (error) {
    said = failed(error);
  }
  state.run = null;
  finish(said);
  if (said.again) await askForKey(said.wrongKey, () => generate(prompt));
}

function request(prompt) {
  const asked = {
    prompt,
    max_tokens: Number(at("max-bytes").value),
    temperature: Number(at("temperature").value),
    top_p: Number(at("top-p").value),
    draft: at("draft").value,
    stream: true,
    stream_options: { include_usage: true },
    blt_details: true,
    ...chosenModel(),
  };
  if (at("seed").value !== "") asked.seed = Number(at("seed").value);
  return asked;
}

function chosenModel() {
  return at("model").value ? { model: at("model").value } : {};
}

// A busy server is asked again when it says, for a while.
async function completeWhenFree(asked, signal) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      await complete(asked, { key: sessionStorage.getItem(KEY), signal, onChunk: (chunk) => take(chunk, asked) });
      return;
    } catch (error) {
      if (error.status !== 429 || attempt === BUSY_TRIES) throw error;
      const seconds = Math.min(30, Math.max(0.2, error.retryAfter ?? 2));
      say(`The server is busy with other texts; asking again in ${duration(seconds)}.`);
      await pause(1000 * seconds, signal);
      say("Waiting for the server\u2026");
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}

// Before anything was made, the prompt is shown as the model reads it.
let lookTimer = 0;

function lookSoon() {
  clearTimeout(lookTimer);
  if (!state.made) lookTimer = setTimeout(lookAtPrompt, LOOK_AFTER);
}

async function lookAtPrompt() {
  state.looking?.abort();
  const prompt = at("prompt").value;
  if (state.run || state.made || !prompt || prompt.length > LOOK_AT_MOST) return;
  const looking = new AbortController();
  state.looking = looking;
  const asked = { prompt, max_tokens: 0, echo: true, stream: true, blt_details: true, ...chosenModel() };
  const entries = [];
  const onChunk = (chunk) => entries.push(...(chunk.blt?.prompt ?? []));
  try {
    await complete(asked, { key: sessionStorage.getItem(KEY), signal: looking.signal, onChunk });
  } catch {
    return; // nobody asked for it; what is wrong is said when somebody does
  }
  if (looking.signal.aborted) return;
  begin(asked);
  for (const entry of entries) add(entry, true);
  drawSoon(state.text.finish());
  draw();
  view.running = false;
  at("entropy-summary").textContent = strip.summary();
  say("Your prompt in patches: press Generate.");
}

// The first of a new text has come: the one before goes.
function begin(asked) {
  state.fresh = true;
  state.text = new ByteText();
  state.prompt = asked.prompt;
  state.most = asked.max_tokens;
  state.answer = "";
  state.reason = state.stats = state.firstAt = null;
  state.drawFrom = Infinity;
  pin(null);
  view.clear(state.text);
  view.running = true;
  strip.clear(state.text);
  setThreshold(state.modelDetails.get(asked.model)?.threshold);
  at("entropy-summary").textContent = "";
  figures.clear();
  document.body.classList.add("has-text");
  document.body.classList.remove("waiting");
}

function setThreshold(value) {
  strip.threshold = typeof value === "number" ? value : null;
  const line = strip.threshold === null ? "" : `; patches start above ${strip.threshold.toFixed(2)}`;
  at("unit").textContent = `entropy in nats${line}`;
}

// One chunk of the stream.
function take(chunk, asked) {
  if (!state.run || state.run.signal.aborted) return;
  if (!state.fresh) {
    begin(asked);
    state.made = true;
  }
  const details = chunk.blt ?? {};
  const choice = chunk.choices?.[0];
  for (const entry of details.prompt ?? []) add(entry, true);
  for (const entry of details.bytes ?? []) add(entry, false);
  if (details.stats) state.stats = details.stats;
  if (choice) {
    state.answer += choice.text ?? "";
    state.reason = details.finish_reason ?? choice.finish_reason ?? state.reason;
  }
}

function add(entry, isPrompt) {
  if (!isPrompt && state.firstAt === null) {
    state.firstAt = performance.now();
    say("Generating\u2026");
  }
  const entropy = typeof entry.entropy === "number" ? entry.entropy : null;
  const from = state.text.add({
    byte: entry.byte,
    position: entry.position,
    startsPatch: Boolean(entry.starts_patch),
    entropy,
    guessed: Boolean(entry.guessed),
    isPrompt,
  });
  drawSoon(from);
}

// 2. How it ends.

const REASONS = {
  eos: "the model ended the text",
  stop: "a stop string ended the text",
  length: "as many as asked for",
  context: "the model has room for no more",
};

function ended() {
  if (!state.fresh) return { line: "Done: nothing came." };
  const after = `after ${bytes(freshBytes())}`;
  const why = REASONS[state.reason];
  return why ? { line: `Done ${after}: ${why}.`, ending: `${bytes(freshBytes())}: ${why}` } : { line: `Done ${after}.` };
}

function failed(error) {
  const came = state.fresh ? freshBytes() : 0;
  if (error.name === "AbortError") {
    const line = state.fresh ? `Stopped after ${bytes(came)}.` : "Stopped before the first byte.";
    return { line, ending: `${bytes(came)}: stopped by you` };
  }
  if (!(error instanceof RequestError)) {
    console.error(error);
    return { line: `The page failed: ${error.message}`, wrong: true };
  }
  if (error.status === 401) {
    const wrongKey = Boolean(sessionStorage.getItem(KEY));
    return { line: "This server asks for a key.", wrong: true, again: true, wrongKey };
  }
  if (error.status === 429) {
    return { line: "The server is still busy with other texts. Try again in a while.", wrong: true };
  }
  const kept = came ? ` ${bytes(came)} had come and are kept.` : "";
  return { line: error.message + kept, wrong: true, ending: `${bytes(came)}: it broke off` };
}

function finish({ line, wrong = false, ending = "" }) {
  if (state.fresh) {
    drawSoon(state.text.finish());
    draw();
    view.end(ending);
    if (state.stats) figures.final(state.stats);
    else figures.unfinished();
    at("entropy-summary").textContent = strip.summary();
  }
  setRunning(false);
  say(line, { wrong });
}

function setRunning(running) {
  if (!running) view.running = false;
  document.body.classList.toggle("waiting", running);
  const focused = document.activeElement;
  at("stop").disabled = !running;
  at("generate").disabled = running;
  at("copy").disabled = running || !state.made;
  at("continue").disabled = running || !state.made;
  // A button that goes out of use must not take the keyboard's place with it.
  if (running && (focused === at("generate") || focused === at("continue"))) at("stop").focus();
  if (!running && focused === at("stop")) at("generate").focus();
}

function say(line, { wrong = false } = {}) {
  at("status").textContent = line;
  at("status").classList.toggle("wrong", wrong);
}

function freshBytes() {
  return state.text.bytes.reduce((count, entry) => count + !entry.isPrompt, 0);
}

function bytes(count) {
  return `${whole(count)} ${count === 1 ? "byte" : "bytes"}`;
}

// 3. Drawing: not for every byte. The model may run on the same small machine and needs its time.

const DRAW_EVERY = 60; // milliseconds
let timer = 0;

function drawSoon(from) {
  state.drawFrom = Math.min(state.drawFrom, from);
  timer ||= setTimeout(draw, DRAW_EVERY);
}

function draw() {
  clearTimeout(timer);
  timer = 0;
  view.update(Math.min(state.drawFrom, state.text.cells.length));
  state.drawFrom = Infinity;
  strip.update();
  const seconds = (performance.now() - state.started) / 1000;
  figures.live(state.text, state.firstAt === null ? null : (state.firstAt - state.started) / 1000, seconds);
}

// 4. A patch to look at: the one pointed at, else the one picked.

function look(index, { how }) {
  if (how === "hover") show(index ?? state.pinned, { scroll: false });
  else pin(index === state.pinned && how === "pick" ? null : index, { aloud: how === "keys", scroll: how === "keys" });
}

function pin(index, { aloud = false, scroll = false } = {}) {
  state.pinned = index;
  show(index, { aloud, scroll });
  if (index !== null && inspector.covers) {
    const hidden = view.markedBottom - inspector.top + 16;
    if (hidden > 0) window.scrollBy(0, hidden);
  }
}

function show(index, { aloud = false, scroll = false }) {
  const known = state.text && index !== null && index < state.text.patches.length ? index : null;
  if (state.text) {
    view.mark(known, { scroll });
    strip.mark(known, { scroll: scroll || known === state.pinned });
  }
  inspector.show(state.text, known, { threshold: strip.threshold, pinned: known === state.pinned, aloud });
}

function walk(event) {
  const last = (state.text?.patches.length ?? 0) - 1;
  if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const from = state.pinned;
  const to = {
    ArrowRight: from === null ? 0 : Math.min(last, from + 1),
    ArrowLeft: from === null ? last : Math.max(0, from - 1),
    Home: 0,
    End: last,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  look(to, { how: "keys" });
}

// 5. Keys, buttons, the server's key.

async function askForKey(wrong, then) {
  const dialog = at("key-dialog");
  at("key-wrong").hidden = !wrong;
  sessionStorage.removeItem(KEY);
  at("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "use") return;
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  say("");
  await then();
}

async function loadModels() {
  const select = at("model");
  try {
    const list = await models(sessionStorage.getItem(KEY));
    state.modelDetails = new Map(list.map((model) => [model.id, model.blt ?? {}]));
    select.replaceChildren(...list.map((model) => new Option(model.id, model.id)));
    select.disabled = list.length < 2;
    suggest(list[0]?.blt?.defaults ?? {});
    lookAtPrompt();
  } catch (error) {
    if (error.status === 401) await askForKey(Boolean(sessionStorage.getItem(KEY)), loadModels);
    else say(error.message, { wrong: true });
  }
}

// What the checkpoint's makers chose for it, where they did, in the place of what the page suggests.
function suggest(defaults) {
  const fields = { max_tokens: "max-bytes", temperature: "temperature", top_p: "top-p" };
  for (const [name, id] of Object.entries(fields)) {
    if (typeof defaults[name] === "number") at(id).value = defaults[name];
  }
  if (typeof defaults.temperature === "number") {
    at("why-temperature").textContent = `Temperature ${defaults.temperature} is the checkpoint\u2019s own.`;
  }
}

async function copy() {
  const text = state.prompt + state.answer;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyOld(text); // a page that does not come from this machine or over TLS has no clipboard
  }
  say(`Copied ${bytes(new TextEncoder().encode(text).length)}, prompt included.`);
}

function copyOld(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function stop() {
  state.run?.abort();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate(at("prompt").value);
});
at("stop").addEventListener("click", stop);
at("copy").addEventListener("click", copy);
at("continue").addEventListener("click", () => {
  if (!at("ask").reportValidity()) return;
  at("prompt").value = state.prompt + state.answer;
  generate(at("prompt").value);
});
at("samples").addEventListener("click", (event) => {
  const sample = event.target.closest("button");
  if (!sample) return;
  at("prompt").value = sample.textContent;
  at("prompt").focus();
  lookSoon();
});
at("prompt").addEventListener("input", lookSoon);
at("text").addEventListener("keydown", walk);
at("unpin").addEventListener("click", () => {
  pin(null);
  at("text").focus({ preventScroll: true });
});
at("key-form").addEventListener("submit", () => at("key-dialog").close("use"));
at("key-cancel").addEventListener("click", () => at("key-dialog").close(""));
document.addEventListener("keydown", (event) => {
  if (at("key-dialog").open) return;
  if (event.key === "Escape") {
    if (state.run) stop();
    else pin(null);
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});

loadModels();
