// The chat: what was said, what is being said, and the controls.
//
// `messages` is the conversation in OpenAI's form; a message of the model also has `about`, what happened to it. All
// that is on the page is drawn from it, so a conversation that is kept can be drawn again.

import {Failure, Reply, events, hasKey, keepKey, parsed, request, servedModel} from "./api.js";
import {announce, button, byId, make} from "./elements.js";
import {Answer, question, seconds, thoughtLabel} from "./turns.js";

const KEPT = "minglm chat";
const SETTINGS = ["temperature", "most", "seed", "system", "tools"];
const SWITCHES = ["thinking", "offer"];
const DRAW_EVERY = 100;  // milliseconds
const LOOK_EVERY = {up: 15_000, gone: 2000};  // milliseconds between looks at the server
const NEAR = 40;  // pixels from the end that count as its end

const talk = byId("talk");
let messages = [];
let answers = new Map();  // message of the model: its Answer
let live = null;  // the answer that is being written: {abort, reply, ...}
let model = null;
let ideas = {about: "", examples: []};
let following = true;  // the reader is at the end, and wants to stay there


// The controls

const press = (name, on) => byId(name).setAttribute("aria-pressed", on);
const pressed = name => byId(name).getAttribute("aria-pressed") === "true";

function grow() {
  byId("say").style.height = "auto";
  byId("say").style.height = `${byId("say").scrollHeight}px`;
}

/** The tools on offer, null without any. Shows what is wrong with them, and returns undefined. */
function offeredTools() {
  if (!pressed("offer")) return null;
  const tools = parsed(byId("tools").value);
  const isList = Array.isArray(tools);
  byId("tools").setAttribute("aria-invalid", !isList);
  byId("tools-fault").hidden = isList;
  if (isList) return tools;
  byId("tools-fault").textContent = "Tools must be a JSON list, such as [{\"type\": \"function\", \"function\": {\"name\": \"now\"}}].";
  openSettings(true);
  byId("tools").focus();
  return undefined;
}

function openSettings(on) {
  byId("settings").hidden = !on;
  byId("open").setAttribute("aria-expanded", on);
}

function body(tools) {
  const system = byId("system").value.trim();
  const said = messages.map(({about, ...message}) => message);
  const found = {
    model,
    stream: true,
    stream_options: {include_usage: true},
    messages: system ? [{role: "system", content: system}, ...said] : said,
    temperature: Number(byId("temperature").value),
    chat_template_kwargs: {enable_thinking: pressed("thinking")},
  };
  if (byId("most").value) found.max_tokens = Math.max(1, Number(byId("most").value));
  if (byId("seed").value) found.seed = Number(byId("seed").value);
  if (tools) found.tools = tools;
  return found;
}

function busy(on) {
  byId("send").textContent = on ? "Stop" : "Send";
  byId("send").classList.toggle("stop", on);
  talk.classList.toggle("busy", on);
}


// What is kept when the page is reloaded

function keep() {
  const said = [...messages];
  if (live && !live.reply.isEmpty) said.push({...live.reply.message(), about: {reason: "reloaded", thought: live.thought}});
  const record = {messages: said, draft: byId("say").value};
  for (const name of SETTINGS) record[name] = byId(name).value;
  for (const name of SWITCHES) record[name] = pressed(name);
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(record));
  } catch {
    // No room, or storage is forbidden: the conversation goes on, and ends with the page.
  }
}

function restore() {
  const record = parsed(sessionStorage.getItem(KEPT) ?? "");
  if (!record) return;
  messages = record.messages;
  byId("say").value = record.draft;
  for (const name of SETTINGS) byId(name).value = record[name];
  for (const name of SWITCHES) press(name, record[name]);
}


// The conversation on the page

/** Draw all of it. */
function draw() {
  answers = new Map();
  talk.replaceChildren();
  if (!messages.length) talk.append(hello());
  const lastQuestion = messages.findLastIndex(message => message.role === "user");
  messages.forEach((message, at) => {
    if (message.role === "user") talk.append(question(message.content, at === lastQuestion && askAgain));
    if (message.role === "assistant") drawAnswer(message);
    if (message.role === "tool") drawResult(message);
  });
  offer();
}

function drawAnswer(message, answer = new Answer()) {
  answer.end(message, message.about);
  answers.set(message, answer);
  if (!answer.turn.isConnected) talk.append(answer.turn);
}

function drawResult(message) {
  const asker = messages.find(other => other.tool_calls?.some(call => call.id === message.tool_call_id));
  const index = asker.tool_calls.findIndex(call => call.id === message.tool_call_id);
  answers.get(asker).cards[index].showResult(message.content);
}

/** What can be done about the last message: give results, or answer again. */
function offer() {
  for (const old of talk.querySelectorAll(".again, form.result")) old.remove();
  const last = messages.at(-1);
  if (last?.role !== "assistant") return;
  const answer = answers.get(last);
  answer.offerAgain(last.about.fault ? "Try again" : "Regenerate", regenerate);
  if (last.tool_calls) collectResults(last, answer);
}

function hello() {
  const box = make("section", "hello"), row = make("div", "ideas");
  box.append(make("h2", "", "What would you like to ask?"));
  if (ideas.about) box.append(make("p", "", ideas.about));
  for (const idea of ideas.examples) {
    const choice = button("idea", "", () => tryIdea(idea));
    choice.append(make("span", "", idea.text));
    if (idea.kind) choice.append(make("small", "", idea.kind));
    row.append(choice);
  }
  box.append(row);
  return box;
}

function tryIdea(idea) {
  if (idea.tools.length) byId("tools").value = toolsAsText(idea.tools);
  press("offer", idea.tools.length > 0);
  ask(idea.text);
}

/** One tool a line: short enough to read, and to edit. */
function toolsAsText(tools) {
  const lines = tools.map(tool => `  ${JSON.stringify({type: "function", function: tool})}`);
  return `[\n${lines.join(",\n")}\n]`;
}

/** Ask for the results of the calls of a message; when all are there, go on. */
function collectResults(message, answer) {
  const results = new Map();
  message.tool_calls.forEach((call, index) => {
    const input = answer.cards[index].askResult(text => {
      results.set(call, text);
      const next = answer.turn.querySelector("form.result input");
      next?.focus();
      if (next) return;
      const tools = offeredTools();
      if (tools === undefined) return;
      for (const each of message.tool_calls) {
        messages.push({role: "tool", tool_call_id: each.id, content: results.get(each)});
      }
      reply(tools);
    });
    if (index === 0) input.focus({preventScroll: true});
  });
}


// Asking and answering

function ask(text) {
  if (live || !text.trim()) return false;
  const tools = offeredTools();
  if (tools === undefined) return false;
  messages.push({role: "user", content: text});
  draw();
  reply(tools);
  return true;
}

/** Ask the last question in other words. */
function askAgain(text) {
  if (live) return;
  messages.length = messages.findLastIndex(message => message.role === "user");
  ask(text);
}

/** Answer the last question, or go on after the last results, once more. */
function regenerate() {
  const tools = offeredTools();
  if (live || tools === undefined) return;
  messages.pop();
  draw();
  reply(tools);
}

/** Answer what was said. */
async function reply(tools) {
  // The button that asked may be gone. On a telephone the field would bring its keyboard up.
  if (!matchMedia("(pointer: coarse)").matches) byId("say").focus({preventScroll: true});
  const answer = new Answer(), now = performance.now();
  live = {abort: new AbortController(), reply: new Reply(), answer, start: now, firstToken: null, thought: null};
  const mine = live, started = messages;
  offer();
  talk.append(answer.turn);
  busy(true);
  toEnd();
  keep();
  const clock = setInterval(() => tell(mine), 250);
  const failure = await read(mine, tools);
  // A page that is left loses its connection first. It does not come to say so: `keep` at its end says more.
  if (failure?.kind === "cut off") await new Promise(resolve => setTimeout(resolve, 300));
  clearInterval(clock);
  clearTimeout(mine.timer);
  if (started !== messages) return;  // a new chat has begun
  tell(mine);  // the last pieces may have come since
  live = null;
  busy(false);
  conclude(mine, failure);
  offer();
  if (following) toEnd();
  keep();
  if (failure?.kind === "key") askForKey(hasKey());
  if (failure?.kind === "unreachable" || failure?.kind === "cut off") look();
}

/** Read the stream into `mine`. Returns what went wrong: a Failure, an AbortError, or null. */
async function read(mine, tools) {
  try {
    if (!model) await look();  // asked before the server had said its name, as right after a reload
    const response = await request("v1/chat/completions", {
      method: "POST",
      signal: mine.abort.signal,
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify(body(tools)),
    });
    mine.isQueued = true;
    for await (const chunk of events(response)) {
      mine.reply.add(chunk);
      if (!mine.reply.isEmpty) mine.firstToken ??= performance.now();
      if (mine.reply.reasoning && !mine.reply.content && !mine.reply.calls.length) {
        mine.thought = performance.now() - mine.firstToken;
      }
      drawSoon(mine);
    }
    return null;
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) return error;
    return new Failure(`The page failed: ${error.message}`, "refused");
  }
}

/** Draw at most every DRAW_EVERY milliseconds, and more rarely if drawing takes long. */
function drawSoon(mine) {
  mine.timer ??= setTimeout(() => {
    const start = performance.now();
    mine.answer.show(mine.reply);
    tell(mine);
    if (start - (mine.kept ?? 0) > 1000) {
      mine.kept = start;
      keep();
    }
    mine.pause = Math.max(DRAW_EVERY, 5 * (performance.now() - start));
    mine.timer = null;
  }, mine.pause ?? 0);
}

/** Say what the answer is doing. */
function tell(mine) {
  const {answer, reply: {content, reasoning, calls}} = mine;
  const isThinking = reasoning && !content && !calls.length;
  const waited = performance.now() - mine.start;
  let state = "Answering";
  if (!mine.isQueued) state = "Sending";
  else if (!mine.firstToken) state = waited < 1000 ? "Waiting" : `Waiting in the queue · ${seconds(waited)}`;
  else if (isThinking) state = "Thinking";
  else if (calls.length) state = "Calling a tool";

  if (reasoning) {
    const label = `Thinking · ${seconds(performance.now() - mine.firstToken)}`;
    answer.thoughtLabel.textContent = isThinking ? label : thoughtLabel(mine.thought, false);
  }
  if (isThinking && !mine.opened) {
    mine.opened = true;
    answer.thought.open = true;
  }
  if (!isThinking && mine.opened && !mine.closed) {
    mine.closed = true;
    if (following) answer.thought.open = false;  // not under the eyes of a reader
  }
  answer.label(isThinking ? "" : state, true);
  const spoken = state.split(" · ")[0];
  if (spoken !== mine.spoken) announce(spoken);
  mine.spoken = spoken;
}

/** Keep what came, and say how it ended. A question that got no answer goes back to the field. */
function conclude(mine, failure) {
  const {reply: {usage, reason, formatError, isEmpty}, answer, thought} = mine;
  const stopped = failure?.name === "AbortError";
  if (failure && isEmpty && messages.at(-1).role === "user") {
    const {content} = messages.pop();
    if (!byId("say").value) byId("say").value = content;
    grow();
    draw();
    if (!stopped) {
      talk.append(make("p", "fault", `${sentence(failure.message)} Your message is back in the field below.`));
    }
    announce(stopped ? "Stopped" : failure.message);
    toEnd();
    return;
  }
  const time = (performance.now() - (mine.firstToken ?? mine.start)) / 1000;
  const about = {reason: stopped ? "stopped" : failure ? "failed" : reason, formatError, thought, most: byId("most").value};
  if (failure && !stopped) about.fault = sentence(failure.message);
  if (usage) about.tokens = usage.completion_tokens;
  if (usage && usage.completion_tokens > 1 && time > 0) about.rate = Math.round(usage.completion_tokens / time);
  const message = {...mine.reply.message(), about};
  messages.push(message);
  drawAnswer(message, answer);
  announce(`Answer finished. ${answer.said.innerText.slice(0, 1000)}`);
}

/** A message as a sentence. */
function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}


// The place on the page

const distance = () => document.documentElement.scrollHeight - innerHeight - scrollY;

function toEnd() {
  following = true;
  byId("latest").hidden = true;
  scrollTo({top: document.documentElement.scrollHeight, behavior: "instant"});
}

let place = 0;  // where the page was; while it follows, the lowest place

/**
 * See where the reader is. Only going up means to leave the end: the text may have grown since the page followed it. And
 * only going up by more than a line or two: a note that goes makes the page shorter, which moves it up by as much.
 */
function mark() {
  const isNear = distance() < NEAR;
  if (isNear) following = true;
  else if (scrollY < place - NEAR || !live) following = false;
  if (isNear || !following || scrollY > place) place = scrollY;
  byId("latest").hidden = following;
}

// An answer that grows takes the reader along only from the end of the page.
new ResizeObserver(() => {
  if (live && following) toEnd();
  else mark();
}).observe(talk);
addEventListener("scroll", mark, {passive: true});
addEventListener("resize", mark);


// The server

let looking = null;

/** See whether the server is there, now and from time to time. */
async function look() {
  clearTimeout(looking);
  let state = "up";
  try {
    const found = await servedModel();
    model = found.id;
    byId("model").textContent = model;
    byId("key-form").hidden = true;
    if (!ideas.examples.length) await fetchIdeas();
  } catch (failure) {
    state = "gone";
    if (failure.kind === "key") {
      state = "key";
      byId("model").textContent = "needs a key";
      askForKey(hasKey());
    } else {
      byId("model").textContent = "no server";
    }
  }
  byId("model").className = `model ${state}`;
  byId("gone").hidden = state !== "gone";
  if (LOOK_EVERY[state]) looking = setTimeout(() => document.hidden ? waitForReader() : look(), LOOK_EVERY[state]);
}

/** Look again when the page is looked at. */
function waitForReader() {
  document.addEventListener("visibilitychange", look, {once: true});
}

function askForKey(refused) {
  byId("key-form").hidden = false;
  byId("key-note").textContent = refused
    ? "The server does not accept this key."
    : "This server asks for a key. It stays in this tab.";
  byId("key").focus();
}

async function fetchIdeas() {
  ideas = await (await request("page/examples.json")).json();
  const offered = ideas.examples.find(idea => idea.tools.length);
  if (!byId("tools").value) byId("tools").value = toolsAsText(offered ? offered.tools : []);
  if (!messages.length && !live) draw();
}


// The beginning

byId("form").onsubmit = event => {
  event.preventDefault();
  if (live) {
    live.abort.abort();
    return;
  }
  const text = byId("say").value;
  byId("say").value = "";
  if (!ask(text)) byId("say").value = text;
  grow();
};
byId("say").oninput = grow;
byId("say").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!live) byId("form").requestSubmit();
};
addEventListener("keydown", event => {
  if (event.key === "Escape") live?.abort.abort();
});
for (const name of SWITCHES) {
  byId(name).onclick = () => {
    press(name, !pressed(name));
    keep();
  };
}
for (const name of SETTINGS) {
  byId(name).onchange = () => {
    if (name === "tools") offeredTools();
    keep();
  };
}
const showHeat = () => { byId("heat").textContent = byId("temperature").value; };
byId("temperature").oninput = showHeat;
byId("open").onclick = () => openSettings(byId("settings").hidden);
byId("fresh").onclick = () => {
  live?.abort.abort();
  live = null;
  messages = [];
  busy(false);
  draw();
  keep();
  byId("say").focus();
};
byId("key-form").onsubmit = event => {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  byId("key").value = "";
  look();
};
byId("latest").onclick = () => {
  toEnd();
  byId("say").focus({preventScroll: true});
};
addEventListener("pagehide", keep);
document.addEventListener("visibilitychange", keep);  // a telephone may end a hidden page without a word

try {
  restore();
  draw();
} catch {  // storage is forbidden, or holds what another version of this page has kept
  messages = [];
  draw();
}
showHeat();
grow();
toEnd();
look();
