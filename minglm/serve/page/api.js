// Talk to the server: requests with a key, server-sent events, and the sum of an answer's pieces.

const KEY = "minglm key";  // kept for this tab only

/** A request that failed. kind: "unreachable", "key", "cut off" or "refused". */
export class Failure extends Error {
  constructor(message, kind) {
    super(message);
    this.kind = kind;
  }
}

let key = null;
try {
  key = sessionStorage.getItem(KEY);
} catch {
  // Storage is forbidden: the key lives as long as the page.
}

export function keepKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // As above.
  }
}

export const hasKey = () => key !== null;

/** Fetch a path with the key. Throws Failure, or AbortError when the reader stops. */
export async function request(path, options = {}) {
  const headers = {...options.headers};
  if (hasKey()) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.", "unreachable");
  }
  if (response.ok) return response;
  throw new Failure(await explanation(response), response.status === 401 ? "key" : "refused");
}

/** What a response that is no answer says: our error object, or the status if a proxy wrote something else. */
async function explanation(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** The model that is served. */
export async function servedModel() {
  return (await (await request("v1/models")).json()).data[0];
}

/** Yield the JSON values of a stream of server-sent events until [DONE]. Throws Failure if it breaks off. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read().catch(error => {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection broke before the answer ended.", "cut off");
    });
    if (done) throw new Failure("The connection ended before the answer did.", "cut off");
    const parts = (held + value).split(/\r?\n\r?\n/);
    held = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter(line => line.startsWith("data:"));
      const data = lines.map(line => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** A JSON text's value, or undefined if the text is not whole. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** The arguments of a call as far as they have come: whole, without the last brace, or inside a string. */
export function argumentsSoFar(text) {
  const settled = text.replace(/\\(u[0-9a-f]{0,3})?$/i, "");  // half of an escape
  return parsed(text) ?? parsed(text + "}") ?? parsed(text + '"}') ?? parsed(settled + '"}');
}

/** The sum of an answer's chunks. */
export class Reply {
  constructor() {
    this.content = "";
    this.reasoning = "";
    this.calls = [];  // by index: a call comes in pieces, its name first
    this.usage = null;
    this.reason = null;  // why it ended: OpenAI's finish_reason
    this.formatError = null;
  }

  /** Add a chunk. Throws Failure if it is an error. */
  add(chunk) {
    if (chunk.error) throw new Failure(chunk.error.message, "refused");
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.reasoning += choice.delta.reasoning_content ?? "";
    this.content += choice.delta.content ?? "";
    for (const piece of choice.delta.tool_calls ?? []) this.#addCall(piece);
    this.reason = choice.finish_reason ?? this.reason;
    this.formatError = choice.format_error ?? this.formatError;
  }

  #addCall(piece) {
    const blank = {id: piece.id, type: "function", function: {name: "", arguments: ""}};
    const call = this.calls[piece.index] ??= blank;
    call.function.name += piece.function.name ?? "";
    call.function.arguments += piece.function.arguments ?? "";
  }

  get isEmpty() {
    return !this.content && !this.reasoning && !this.calls.length;
  }

  /** The message to keep. */
  message() {
    const message = {role: "assistant", content: this.content};
    // Reasoning without an end that was the answer has come again as content.
    const wasTheAnswer = this.formatError === "unclosed_think" && this.content.trim() === this.reasoning.trim();
    if (this.reasoning && !wasTheAnswer) message.reasoning_content = this.reasoning;
    // A call whose arguments do not end was withdrawn, and its text has come as content, or it was cut off.
    const whole = this.calls.filter(call => parsed(call.function.arguments) !== undefined);
    if (whole.length) message.tool_calls = whole;
    return message;
  }
}
