// Show what a model writes as Markdown, safely, and fast while it grows.
//
// Three walls, one behind the other: raw HTML is shown as the text that it is, and images as links, so that nothing a
// model writes is loaded; DOMPurify lets through a short list of elements and web addresses; the server's content
// security policy allows no inline script.
//
// A text that grows is cut into blocks. The last two of its whole lines may still change, because a list goes on after
// a blank line; what is before them is drawn once.

import {Lexer, Marked} from "./vendor/marked-18.2.1/marked.esm.js";
import hljs from "./vendor/highlight-11.12.0/core.min.js";
import bash from "./vendor/highlight-11.12.0/languages/bash.min.js";
import c from "./vendor/highlight-11.12.0/languages/c.min.js";
import javascript from "./vendor/highlight-11.12.0/languages/javascript.min.js";
import json from "./vendor/highlight-11.12.0/languages/json.min.js";
import python from "./vendor/highlight-11.12.0/languages/python.min.js";
import xml from "./vendor/highlight-11.12.0/languages/xml.min.js";
import {copyButton, make} from "./elements.js";

for (const [name, grammar] of Object.entries({bash, c, javascript, json, python, xml})) {
  hljs.registerLanguage(name, grammar);
}

const OPEN_BLOCKS = 2;
const LONGEST = 200_000;  // characters; more is shown as plain text
const LONGEST_COLOURED = 20_000;
const SLOW = 300;  // milliseconds to draw the open blocks, after which they are plain text until the end
const LINK = /^(https?:\/\/|mailto:)/i;
const DEFINITION = /^ {0,3}\[[^\]]+\]:/m;

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr h3 h4 h5 h6 strong em del code pre blockquote ul ol li a span".split(" "),
    ..."table thead tbody tr th td #text".split(" "),
  ],
  ALLOWED_ATTR: ["href", "start", "align", "class", "data-language"],
  ALLOWED_URI_REGEXP: LINK,
  ADD_URI_SAFE_ATTR: ["start", "align", "data-language"],  // no addresses
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = text => text.replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);

const link = (href, inside) => LINK.test(href) ? `<a href="${escaped(href)}">${inside}</a>` : inside;

const renderer = {
  html({text, block}) {
    return block ? `<p class="raw">${escaped(text.trimEnd())}</p>` : escaped(text);
  },
  image({href, text}) {
    return link(href, escaped(`image: ${text || href}`));
  },
  link({href, tokens}) {
    return link(href, this.parser.parseInline(tokens));
  },
  heading({depth, tokens}) {
    const level = Math.min(depth + 2, 6);  // below the page's own headings
    return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
  },
  code({text, lang}) {
    const language = (lang ?? "").trim().split(/\s/)[0].toLowerCase();
    const isKnown = hljs.getLanguage(language) && text.length < LONGEST_COLOURED;
    const inside = isKnown ? hljs.highlight(text, {language, ignoreIllegals: true}).value : escaped(text);
    return `<pre data-language="${escaped(language)}"><code>${inside}</code></pre>`;
  },
  checkbox({checked}) {
    return checked ? "☑ " : "☐ ";
  },
};

const OPTIONS = {gfm: true, breaks: true};
const marked = new Marked({...OPTIONS, renderer});

/** The blocks of a text, and the link definitions in it. known: definitions that came before. */
function blocks(text, known) {
  const lexer = new Lexer(marked.defaults);
  Object.assign(lexer.tokens.links, known);
  const tokens = lexer.lex(text);
  return {tokens: programs(tokens), links: tokens.links};
}

/**
 * Join what belongs to a program that stands without a fence: a small model answers with bare Python, whose
 * indentation Markdown would drop.
 */
function programs(tokens) {
  const joined = [];
  for (const token of tokens) {
    const previous = joined.at(-1), last = previous?.type === "space" ? joined.at(-2) : previous;
    if (token.type === "paragraph" && /^(def|class) \w+.*:(\n[ \t]|$)/.test(token.raw)) {
      joined.push({type: "code", raw: token.raw, text: token.raw.trimEnd(), lang: "python", isBare: true});
    } else if (token.type === "code" && token.codeBlockStyle === "indented" && last?.isBare) {
      if (previous !== last) last.raw += joined.pop().raw;
      last.raw += token.raw;
      last.text = last.raw.trimEnd();
    } else {
      joined.push(token);
    }
  }
  return joined;
}

/** The elements of some blocks. */
function drawn(tokens) {
  const part = window.DOMPurify.sanitize(marked.parser(tokens), ALLOWED);
  for (const anchor of part.querySelectorAll("a")) {
    anchor.target = "_blank";
    anchor.rel = "noopener noreferrer nofollow";
  }
  for (const table of part.querySelectorAll("table")) {
    const frame = make("div", "wide-table");
    frame.tabIndex = 0;  // to scroll it with the keyboard
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of part.querySelectorAll("pre")) {
    const frame = make("div", "code"), head = make("div", "code-head");
    head.append(make("span", "", pre.dataset.language || "code"), copyButton("Copy code", () => pre.textContent));
    pre.tabIndex = 0;
    pre.replaceWith(frame);
    frame.append(head, pre);
  }
  return part;
}

/** A text that grows, inside an element. */
export class Prose {
  constructor(element) {
    this.element = element;
    this.element.dir = "auto";
    this.#clear();
  }

  #clear() {
    this.element.replaceChildren();
    this.settled = 0;  // characters that are drawn for good
    this.nodes = 0;  // child nodes that they have become
    this.links = {};
    this.isPlain = false;
  }

  /** Show the text so far. ended: nothing will follow. */
  show(text, ended = false) {
    text = text.replace(/\r\n?/g, "\n");
    if (ended && DEFINITION.test(text)) this.#clear();  // a link's definition may serve what is before it
    const start = performance.now();
    const tail = text.slice(this.settled);
    try {
      if (text.length > LONGEST || (this.isPlain && !ended)) throw new RangeError("too long to draw");
      this.#draw(tail, ended);
    } catch {  // nested too deeply, or too long
      this.#replaceOpen(make("p", "raw", tail));
    }
    this.isPlain ||= performance.now() - start > SLOW;
  }

  #draw(tail, ended) {
    if (!ended) tail = tail.slice(this.#settle(tail.slice(0, tail.lastIndexOf("\n") + 1)));
    this.#replaceOpen(drawn(blocks(tail, this.links).tokens));
  }

  /** Draw for good the blocks of some whole lines that nothing can change any more; return their characters. */
  #settle(lines) {
    const {tokens, links} = blocks(lines, this.links);
    const solid = tokens.flatMap((token, at) => token.type === "space" || token.type === "def" ? [] : [at]);
    const before = tokens.slice(0, solid.at(-OPEN_BLOCKS) ?? 0);
    const raw = before.map(token => token.raw).join("");
    if (!raw || !lines.startsWith(raw)) return 0;
    this.#replaceOpen(drawn(before));
    this.nodes = this.element.childNodes.length;
    this.settled += raw.length;
    this.links = links;
    return raw.length;
  }

  /** Put elements in the place of the open blocks. */
  #replaceOpen(part) {
    while (this.element.childNodes.length > this.nodes) this.element.lastChild.remove();
    this.element.append(part);
  }
}
