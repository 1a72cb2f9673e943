// The server's API: models, and a completion as a stream of chunks. Knows no DOM.

/** Why a request came to nothing, in words for a person. `status` 0: no answer at all. */
export class RequestError extends Error {
  constructor(message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    /** Seconds after which the server wants to be asked again, or null. */
    this.retryAfter = retryAfter;
  }
}

const GONE = "The server does not answer. Is blt-edge serve still running?";

/** Ids of the server's models. Raises RequestError. */
export async function models(key) {
  const response = await ask("/v1/models", { headers: headers(key) });
  const { data } = await response.json();
  return data;
}

/**
 * Ask for a completion and call `onChunk` with each chunk's object, as it comes.
 *
 * Ends quietly after the last chunk. Raises RequestError, and AbortError when `signal` aborts.
 */
export async function complete(request, { key, signal, onChunk }) {
  const response = await ask("/v1/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new RequestError(sentence(chunk.error.message), { status: response.status });
    onChunk(chunk);
  }
  throw new RequestError("The connection broke before the text had ended.");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(GONE);
  }
  if (response.ok) return response;
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After"));
  throw new RequestError(await said(response), {
    status: response.status,
    retryAfter: Number.isFinite(retryAfter) ? retryAfter : null,
  });
}

// What an answer with an error's status says.
async function said(response) {
  let message = "";
  try {
    message = (await response.json()).error?.message ?? "";
  } catch {
    // Not ours, perhaps a proxy's page.
  }
  return message ? sentence(message) : `The server answered ${response.status} ${response.statusText}`.trim() + ".";
}

function sentence(message) {
  const text = String(message ?? "the server failed").trim();
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new RequestError("The server sent something that is no completion.");
  }
}

// The data of each server-sent event: lines `data: ...`, ended by an empty line.
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (signal?.aborted || error.name === "AbortError") throw new DOMException("stopped", "AbortError");
    if (error instanceof RequestError) throw error;
    throw new RequestError("The connection broke before the text had ended. Is blt-edge serve still running?");
  } finally {
    reader.cancel().catch(() => {});
  }
}
