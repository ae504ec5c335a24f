/** The OpenAI-compatible API with the extension for specialists: models, health, and streamed chat completions. */

/** A request that a server refused, or a server that cannot be reached. */
export class ServerError extends Error {
  /** @param {"lost" | "key" | "busy" | "refused"} kind */
  constructor(kind, message, param = null) {
    super(message);
    this.kind = kind;
    this.param = param;
  }
}

const LOST_CODES = ["server_lost", "shutting_down"];

let key = sessionStorage.getItem("ultrafuser-key") ?? "";

/** Remember the key for this tab. */
export function setKey(value) {
  key = value;
  sessionStorage.setItem("ultrafuser-key", value);
}

export const hasKey = () => key !== "";

async function call(address, options = {}) {
  // The key belongs to this server. Compared servers get theirs from the command line.
  const authorization = key && !address.startsWith("playground/others/") ? { authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(address, { ...options, headers: { ...options.headers, ...authorization } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("lost", "The server cannot be reached.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a gateway's page instead of the API's error
  }
  const message = error.message ?? `The server answered with status ${response.status}.`;
  if (response.status === 401 || response.status === 403) return new ServerError("key", message);
  if (response.status === 429) {
    const wait = response.headers.get("retry-after");
    return new ServerError("busy", wait ? `${message} Try again in ${wait} s.` : message);
  }
  if ([502, 503, 504].includes(response.status)) return new ServerError("lost", message);
  return new ServerError("refused", message, error.param ?? null);
}

export async function getJson(address) {
  return (await call(address)).json();
}

/** The models of a server: `[{id, specialists, contextLength}]`. Without specialists it is no fused model. */
export async function getModels(base) {
  const { data = [] } = await getJson(`${base}v1/models`);
  return data.map((model) => ({
    id: model.id,
    specialists: model.specialists ?? [],
    contextLength: model.max_model_len ?? null,
  }));
}

/** Whether the server answers. Many servers have no such route, and a 404 of theirs is an answer too. */
export async function isHealthy() {
  try {
    return (await fetch("health", { cache: "no-store" })).status < 500;
  } catch {
    return false;
  }
}

export async function postJson(address, body, signal) {
  const headers = { "content-type": "application/json" };
  return call(address, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/**
 * Stream a chat completion. Yields `{tokens: [{text, weights, top}], usage, finishReason}` per chunk.
 *
 * @throws {ServerError} also if the stream ends in the middle.
 */
export async function* streamChat(base, body, signal) {
  const response = await postJson(`${base}v1/chat/completions`, body, signal);
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(LOST_CODES.includes(chunk.error.code) ? "lost" : "refused", chunk.error.message);
    const choice = chunk.choices?.[0];
    yield { tokens: tokensOf(choice), usage: chunk.usage ?? null, finishReason: choice?.finish_reason ?? null };
  }
  throw new ServerError("lost", "The connection to the server broke.");
}

/** The `data:` of every server-sent event. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal?.aborted) throw new DOMException("stopped", "AbortError");
      throw new ServerError("lost", "The connection to the server broke.");
    }
    if (part.done) return;
    buffer += part.value;
    const lines = buffer.split(/\r\n|\n|\r/);
    buffer = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

function tokensOf(choice) {
  const content = choice?.delta?.content ?? "";
  const gate = choice?.gate_weights;
  if (!gate?.tokens?.length) return content ? [{ text: content, weights: null, top: null }] : [];
  const tokens = gate.tokens.map((text, i) => ({ text, weights: gate.weights[i], top: gate.top?.[i] ?? null }));
  if (tokens.map((token) => token.text).join("") === content) return tokens;
  return [{ ...tokens.at(-1), text: content }]; // a server that cuts its chunks elsewhere: no text may be lost
}
