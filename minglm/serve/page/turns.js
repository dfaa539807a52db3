// Draw the turns of a conversation: questions, and answers with their thoughts, text, tool calls and notes.

import {argumentsSoFar} from "./api.js";
import {button, copyButton, make} from "./elements.js";
import {Prose} from "./markdown.js";

/** The parser's names of faults in the chat format, in plain words. */
const FORMAT_FAULTS = {
  unclosed_think: "The thinking has no end.",
  call_in_think: "A tool call came in the middle of the thinking.",
  unclosed_tool_call: "The answer ended inside a tool call.",
  bad_tool_call: "A tool call was malformed.",
  unknown_tool: "It called a tool that was not offered.",
  missing_argument: "A tool call lacks a required argument.",
  unknown_argument: "A tool call has an argument that the tool does not know.",
  bad_argument: "An argument of a tool call does not fit the tool.",
  stray_tag: "A tag of the chat format stands where none belongs.",
  text_after_call: "Text came after a tool call.",
};

export const seconds = milliseconds => `${(milliseconds / 1000).toFixed(1)} s`;

/** A question. onEdit(text) asks it again in other words; without it the question cannot be edited. */
export function question(text, onEdit) {
  const turn = make("article", "turn asked"), bubble = make("div", "user", text);
  turn.setAttribute("aria-label", "You");
  bubble.dir = "auto";
  turn.append(bubble);
  if (onEdit) {
    const row = make("div", "actions");
    row.append(button("small", "Edit", () => turn.replaceChildren(editor(turn, text, onEdit))));
    turn.append(row);
  }
  return turn;
}

function editor(turn, text, onEdit) {
  const form = make("form", "edit"), field = make("textarea"), row = make("div", "row");
  field.value = text;
  field.rows = Math.min(8, text.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit your message");
  const cancel = () => turn.replaceWith(question(text, onEdit));
  row.append(button("quiet", "Cancel", cancel), make("button", "solid", "Ask again"));
  form.append(field, row);
  form.onsubmit = event => {
    event.preventDefault();
    if (field.value.trim()) onEdit(field.value);
  };
  field.onkeydown = event => {
    if (event.key === "Escape") cancel();
  };
  queueMicrotask(() => field.focus());
  return form;
}

/** An answer that is being written, or was. */
export class Answer {
  constructor() {
    this.turn = make("article", "turn answer");
    this.turn.setAttribute("aria-label", "Answer");
    this.thought = make("details", "thought");
    this.thoughtLabel = make("summary");
    this.reasons = make("div", "reasons");
    this.reasons.append("");
    this.reasons.dir = "auto";
    this.reasons.tabIndex = 0;
    this.thought.append(this.thoughtLabel, this.reasons);
    this.said = make("div", "said");
    this.prose = new Prose(this.said);
    this.cards = [];
    this.foot = make("div", "foot");
    this.state = make("span", "state");
    this.actions = make("div", "actions");
    this.foot.append(this.state, this.actions);
    this.turn.append(this.said, this.foot);
  }

  /** Show a reply as far as it has come. */
  show(reply, ended = false) {
    if (reply.reasoning) this.#think(reply.reasoning);
    this.prose.show(reply.content, ended);
    reply.calls.forEach((call, index) => {
      this.cards[index] ??= new Card(call.function.name);
      if (!this.cards[index].box.isConnected) this.foot.before(this.cards[index].box);
      this.cards[index].fill(call);
    });
  }

  #think(reasoning) {
    if (!this.thought.isConnected) this.turn.prepend(this.thought);
    const {scrollTop, scrollHeight, clientHeight} = this.reasons;
    const follows = scrollTop + clientHeight > scrollHeight - 20;
    const shown = this.reasons.firstChild;
    shown.appendData(reasoning.slice(shown.length));  // what is there stays: a selection survives
    if (follows) this.reasons.scrollTop = this.reasons.scrollHeight;
  }

  /** Say what is going on. live: it still is. */
  label(text, live) {
    this.state.textContent = text;
    this.turn.classList.toggle("live", live);
    this.turn.setAttribute("aria-busy", live);
  }

  /** Draw a message that has ended, with what happened to it. */
  end(message, about) {
    for (const card of this.cards) card?.box.remove();  // those of withdrawn calls are among them
    this.cards = [];
    this.show({content: message.content, reasoning: message.reasoning_content, calls: message.tool_calls ?? []}, true);
    if (!message.reasoning_content) this.thought.remove();
    const isUnfinished = !message.content && !message.tool_calls && about.reason !== "stop";
    this.thoughtLabel.textContent = thoughtLabel(about.thought, isUnfinished);
    for (const note of notes(about)) this.foot.before(make("p", note.kind, note.text));
    this.label(numbers(about), false);
    if (message.content) this.actions.append(copyButton("Copy answer", () => message.content));
  }

  /** Offer to answer again. */
  offerAgain(label, again) {
    this.actions.append(button("small again", label, again));
  }
}

/** How long a thought took, in milliseconds. */
export function thoughtLabel(time, isUnfinished) {
  return isUnfinished ? `Broke off thinking after ${seconds(time)}` : `Thought for ${seconds(time)}`;
}

/** What went otherwise than it should, in plain words. */
function notes(about) {
  const found = [];
  if (about.formatError) {
    found.push({kind: "note", text: `The answer is not in the chat format. ${FORMAT_FAULTS[about.formatError]}`});
  }
  if (about.reason === "length") found.push({kind: "note", text: tooLong(about.most)});
  if (about.reason === "stopped") found.push({kind: "note", text: "You stopped the answer."});
  if (about.reason === "reloaded") {
    found.push({kind: "note", text: "The page was reloaded before the answer ended."});
  }
  if (about.fault) found.push({kind: "fault", text: about.fault});
  return found;
}

function tooLong(most) {
  if (most) return `The answer was cut off at ${most} tokens, the limit in Settings.`;
  return "The answer was cut off: the conversation is as long as this model can read. Start a new chat.";
}

function numbers(about) {
  const parts = [];
  if (about.tokens) parts.push(`${about.tokens} ${about.tokens === 1 ? "token" : "tokens"}`);
  if (about.rate) parts.push(`${about.rate} per second`);
  return parts.join(" · ");
}

/** A tool call: its name, its arguments as they come, and its result. */
class Card {
  constructor(name) {
    this.box = make("div", "call");
    this.name = name;
    this.table = make("table");
    const head = make("div", "name", name);
    head.append(make("small", "", "tool call"));
    this.box.append(head, this.table);
  }

  /** Draw the arguments as far as they have come. */
  fill(call) {
    const found = argumentsSoFar(call.function.arguments);
    if (found === undefined) return;
    const rows = Object.entries(found).map(([key, value]) => {
      const row = make("tr"), name = make("th", "", key);
      name.scope = "row";
      row.append(name, make("td", "", typeof value === "string" ? value : JSON.stringify(value)));
      return row;
    });
    this.table.replaceChildren(...rows);
  }

  /** Show a result. */
  showResult(text) {
    this.box.querySelector(".result")?.remove();
    const shown = make("div", "result");
    shown.append(make("span", "", "result"), make("output", "", text));
    this.box.append(shown);
  }

  /** Ask the reader for the result. */
  askResult(onResult) {
    const form = make("form", "result"), input = make("input");
    input.placeholder = 'such as {"status": "pending"}';
    input.setAttribute("aria-label", `Result of ${this.name}`);
    form.append(make("span", "", "result"), input, make("button", "solid", "Send result"));
    form.onsubmit = event => {
      event.preventDefault();
      this.showResult(input.value);
      onResult(input.value);
    };
    this.box.append(form);
    return input;
  }
}
