// The page of a run. Data come from the server, or from inside a static page; nothing is ever put in as HTML.
"use strict";
const $ = id => document.getElementById(id);
const inside = $("data") ? JSON.parse($("data").textContent) : null;
const EVERY = 3000; // ms between two looks at a run that trains
let overview = null, rows = [], shown = [], at = -1, sample = null, chosen = null, listed = null;

function element(name, text, attributes = {}) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

async function load(path, embedded) {
  if (inside) return embedded(inside);
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.json()).error?.message ?? `${path}: status ${answer.status}`);
  return answer.json();
}

function fill(select, values) {
  const before = select.value;
  const known = [...select.options].map(option => option.value + option.text).join();
  if (known === values.map(([value, text]) => value + text).join()) return; // it may be open
  select.replaceChildren(...values.map(([value, text]) => element("option", text, { value })));
  if (values.some(([value]) => value === before)) select.value = before;
}

const short = number => number === null || number === undefined ? "none"
  : Number.isInteger(number) ? String(number) : String(+number.toPrecision(4));

async function refresh() {
  try {
    overview = await load("overview.json", data => data.overview);
    $("fault").hidden = true;
  } catch (error) {
    $("fault").textContent = `The run cannot be read: ${error.message}`;
    $("fault").hidden = false;
    return;
  }
  $("name").textContent = overview.name;
  document.title = `${overview.name}: a run`;
  const now = overview.stages.find(stage => !stage.done);
  $("state").textContent = overview.ended ? "finished" : now ? `in stage ${now.name}` : "between two stages";
  const stages = Object.keys(overview.curves).filter(name => overview.curves[name].step.length);
  fill($("curve-stage"), stages.map(name => [name, name]));
  fill($("load-stage"), stages.filter(name => overview.loads[name].step).map(name => [name, name]));
  fill($("time-stage"), stages.filter(name => overview.time_lines[name].lanes).map(name => [name, name]));
  fill($("sample-stage"), Object.entries(overview.samples).map(([name, count]) => [name, `${name} (${count})`]));
  $("stages").replaceChildren(...overview.stages.map(stage => {
    const item = element("li");
    const seconds = stage.seconds ? `, ${short(stage.seconds)} s` : "";
    const button = element("button", stage.name + (stage.done ? seconds : ", under way"), { title: stage.teaches });
    button.classList.toggle("done", stage.done);
    button.onclick = () => { $("curve-stage").value = stage.name; drawCurve(); };
    item.append(button);
    return item;
  }));
  drawCurve(); drawLoad(); drawTime(); drawScores();
  if (!$("samples").hidden) await listSamples();
}

function drawCurve() {
  const stage = overview.curves[$("curve-stage").value];
  if (!stage) return;
  const names = Object.keys(stage).filter(name => name !== "step");
  fill($("curve-name"), names.map(name => [name, name]));
  const name = $("curve-name").value;
  const points = stage.step.map((step, i) => [step, stage[name][i]]).filter(([, y]) => Number.isFinite(y));
  const width = 900, height = 300, left = 60, bottom = 30;
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = v => left + (v - x0) / (x1 - x0 || 1) * (width - left - 12);
  const y = v => height - bottom - (v - y0) / (y1 - y0 || 1) * (height - bottom - 12);
  const svg = picture(width, height, `${name} of ${$("curve-stage").value} from ${short(ys[0])} to ${short(ys.at(-1))}`);
  const path = shape("path", { d: points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("") });
  svg.append(path, label(short(y1), 4, 20), label(short(y0), 4, height - bottom), label(`step ${short(x0)}`, left, height - 8),
    label(short(x1), width - 50, height - 8));
  $("chart").replaceChildren(svg);
  $("caption").textContent = `${name}: last ${short(ys.at(-1))} at step ${short(xs.at(-1))}`;
}

function picture(width, height, text) {
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text });
  return svg;
}

function shape(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function label(text, x, y) {
  const node = shape("text", { x, y });
  node.textContent = text;
  return node;
}

function drawLoad() {
  const load = overview.loads[$("load-stage").value];
  if (!load?.step) { $("load").replaceChildren(element("p", "No stage has logged the load of its experts yet.")); return; }
  const table = load.load_max_over_mean, layers = table.at(-1).length, count = table.length;
  const width = 900, cell = (width - 60) / count, tall = 22;
  const svg = picture(width, layers * tall + 34, "load of the busiest expert, by layer and step");
  const worst = Math.max(2, ...table.flat());
  table.forEach((values, i) => values.forEach((value, layer) => {
    const share = Math.min(1, Math.max(0, (value - 1) / (worst - 1)));
    const box = shape("rect", { x: 60 + i * cell, y: layer * tall, width: cell + .3, height: tall - 2,
      fill: `hsl(${150 - 150 * share} 55% ${70 - 25 * share}%)` });
    box.append(shape("title", {}));
    box.firstChild.textContent = `step ${load.step[i]}, layer ${layer + 1}: ${short(value)}`;
    svg.append(box);
  }));
  for (let layer = 0; layer < layers; layer++) svg.append(label(`layer ${layer + 1}`, 4, layer * tall + 15));
  svg.append(label(`step ${load.step[0]}`, 60, layers * tall + 20), label(`${load.step.at(-1)}`, width - 50, layers * tall + 20));
  $("load").replaceChildren(svg);
  const last = load.load_entropy?.at(-1);
  $("load-caption").textContent = `Last step: ${table.at(-1).map(short).join(", ")}`
    + (last ? `; entropy of the loads over log E: ${last.map(short).join(", ")}.` : ".");
}

// Phases that others overlap in a lane: an episode is in its environment while another one waits for the model.
const BELOW = ["environment", "reward"];

function drawTime() {
  const line = overview.time_lines[$("time-stage").value];
  if (!line?.lanes) { $("lanes").replaceChildren(element("p", "No stage of reinforcement learning has logged its time yet.")); return; }
  const width = 900, left = 90, tall = 40, end = Math.max(...line.spans.map(span => span[3])) || 1;
  const x = seconds => left + seconds / end * (width - left - 12);
  const svg = picture(width, line.lanes.length * tall + 28, `time line of ${$("time-stage").value}, ${short(end)} seconds`);
  for (const [lane, phase, began, ended] of line.spans) {
    const below = BELOW.includes(phase);
    const box = shape("rect", { class: phase, x: x(began).toFixed(2), width: Math.max(.5, x(ended) - x(began)).toFixed(2),
      y: lane * tall + (below ? 25 : 6), height: below ? 8 : 18 });
    box.append(shape("title", {}));
    box.firstChild.textContent = `${line.lanes[lane]}: ${phase}, ${short(ended - began)} s from ${short(began)} s`;
    svg.append(box);
  }
  line.lanes.forEach((lane, i) => svg.append(label(lane, 4, i * tall + 20)));
  svg.append(label("0 s", left, line.lanes.length * tall + 18), label(`${short(end)} s`, width - 60, line.lanes.length * tall + 18));
  $("lanes").replaceChildren(svg);
  $("time-caption").textContent = `Steps ${line.steps[0]} to ${line.steps[1]}, ${short(end)} seconds.`;
  $("busy").tBodies[0].replaceChildren(...line.lanes.map((lane, i) => {
    const row = element("tr");
    row.append(element("th", lane));
    for (const [phase, share] of Object.entries(line.busy[i])) {
      const cell = element("td", `${phase} ${(100 * share).toFixed(0)}%`);
      if (phase !== "idle") cell.prepend(element("i", "", { class: `key ${phase}` }));
      row.append(cell);
    }
    return row;
  }));
}

function drawScores() {
  const body = $("scores").tBodies[0];
  body.replaceChildren(...overview.scores.map(score => {
    const row = element("tr");
    const rest = Object.entries(score).filter(([key, value]) => !["kind", "stage"].includes(key) && value !== null);
    row.append(element("th", score.stage), element("td", score.kind),
      element("td", rest.map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : typeof value === "number" ? short(value) : value}`).join(" · ")));
    return row;
  }));
}

async function listSamples() {
  const stage = $("sample-stage").value;
  if (!stage) { $("rows").replaceChildren(element("li", "No samples are kept yet: a stage of RL writes them.")); return; }
  const found = await load(`samples/${encodeURIComponent(stage)}.json`, data => ({ rows: data.samples[stage] }));
  if (listed === `${stage} ${found.rows.length}`) return; // nothing new: the focus stays where it is
  listed = `${stage} ${found.rows.length}`;
  rows = found.rows;
  const tasks = [...new Set(rows.map(row => row.environment))].sort();
  fill($("sample-task"), [["", "any"], ...tasks.map(name => [name, name])]);
  filterSamples();
}

function filterSamples() {
  const task = $("sample-task").value, reward = $("sample-reward").value;
  const fits = { "": () => true, right: r => r >= 1, part: r => r > 0 && r < 1, wrong: r => r <= 0 }[reward];
  const open = shown[at], focused = $("rows").contains(document.activeElement);
  shown = rows.map((row, number) => ({ ...row, number })).filter(row => (!task || row.environment === task) && fits(row.reward));
  at = open ? shown.findIndex(row => row.number === open.number) : -1;
  $("rows").replaceChildren(...shown.map((row, i) => {
    const item = element("li");
    const text = `step ${row.step + 1} · ${row.environment} ${row.difficulty ?? ""} · reward ${short(row.reward)} · ${row.length} tokens`
      + (row.calls ? ` · ${row.calls} calls` : "") + (row.status === "infrastructure" ? " · failed" : "");
    const button = element("button", text, { "aria-current": i === at });
    button.onclick = () => openSample(i);
    item.append(button);
    return item;
  }));
  if (focused && at >= 0) $("rows").querySelectorAll("button")[at].focus();
  if (!shown.length) $("rows").replaceChildren(element("li", "No sample fits."));
}

async function openSample(i) {
  if (i < 0 || i >= shown.length) return;
  at = i;
  const stage = $("sample-stage").value, number = shown[i].number;
  sample = await load(`samples/${encodeURIComponent(stage)}/${number}.json`, data => data.sample[stage][number]);
  chosen = null;
  [...$("rows").querySelectorAll("button")].forEach((button, n) => button.setAttribute("aria-current", n === at));
  $("rows").querySelectorAll("button")[at].scrollIntoView({ block: "nearest" });
  drawSample();
}

// The colour of a token: [hue, strength from 0 to 1], or null for none.
const COLOURS = {
  mask: () => [150, .5],
  logprob: token => [30, Math.min(1, -token[1] / 5)],
  gap: token => token[2] === null ? null : [token[2] > token[1] ? 210 : 10, Math.min(1, Math.abs(token[2] - token[1]) * 5)],
  advantage: () => typeof sample.advantage === "number" ? [sample.advantage >= 0 ? 150 : 10, Math.min(1, Math.abs(sample.advantage))] : null,
  version: token => token[3] === null ? null : [(token[3] * 67) % 360, .6],
};

function drawSample() {
  const colour = COLOURS[$("colour").value];
  const parts = Object.entries(sample.parts ?? {}).map(([name, value]) => `${name} ${short(value)}`).join(", ");
  const about = element("p", `reward ${short(sample.reward)} (${sample.status}${sample.detail ? ": " + sample.detail : ""}), advantage ${short(sample.advantage)}`
    + (parts ? `; ${parts}` : "") + `; thinking ${sample.thinking ? "on" : "off"}; task ${sample.task}`, { class: "about", id: "about" });
  const blocks = [about];
  sample.segments.forEach((segment, s) => {
    if (sample.segments.length > 1) blocks.push(element("h2", `Segment ${s + 1}`));
    const box = element("div", undefined, { class: "tokens", tabindex: "0", role: "group",
      "aria-label": "tokens; the arrow keys choose one" });
    segment.tokens.forEach((token, t) => {
      const node = element("span", token[0]);
      if (token[1] === null) node.className = "context";
      else {
        const found = colour(token);
        if (found) node.style.background = `hsl(${found[0]} 60% 50% / ${(.08 + .5 * found[1]).toFixed(2)})`;
      }
      node.onclick = () => choose(s, t);
      box.append(node);
    });
    box.onkeydown = event => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const from = chosen && chosen[0] === s ? chosen[1] : -1;
      choose(s, Math.min(segment.tokens.length - 1, Math.max(0, from + move)));
    };
    blocks.push(box);
  });
  const calls = (sample.messages ?? []).flatMap(message => message.tool_calls ?? []);
  if (calls.length) {
    blocks.push(element("h2", "Tool calls"));
    const list = element("ol", undefined, { id: "calls" });
    list.append(...calls.map(call => element("li", `${call.name}(${JSON.stringify(call.arguments)})`)));
    blocks.push(list);
  }
  blocks.push(element("div", undefined, { id: "token", "aria-live": "polite" }));
  $("one").replaceChildren(...blocks);
  if (chosen) choose(...chosen);
}

function choose(s, t) {
  chosen = [s, t];
  const boxes = $("one").querySelectorAll(".tokens");
  $("one").querySelectorAll(".chosen").forEach(node => node.classList.remove("chosen"));
  boxes[s].children[t].classList.add("chosen");
  const [text, logprob, trained, version] = sample.segments[s].tokens[t];
  const words = logprob === null ? "context, not trained"
    : `log-probability ${short(logprob)}` + (trained === null ? "" : `, the trainer's ${short(trained)}, gap ${short(trained - logprob)}`)
      + (version === null ? "" : `, weights of version ${version}`);
  const about = [element("h2", `Token ${t + 1}: ${JSON.stringify(text)}`), element("p", words, { class: "about" })];
  const experts = sample.segments[s].experts?.[t];
  if (experts) {
    const table = element("table", undefined, { class: "routing", "aria-label": "experts of the token, by MoE layer" });
    experts.forEach((choices, layer) => {
      const row = element("tr"), cell = element("td");
      cell.append(...choices.map(expert => element("i", expert)));
      row.append(element("th", `layer ${layer + 1}`), cell);
      table.append(row);
    });
    about.push(table);
  } else about.push(element("p", "Its experts were not kept; rl.routing_replay keeps them.", { class: "about" }));
  $("token").replaceChildren(...about);
}

document.querySelectorAll("nav button").forEach(button => button.onclick = async () => {
  for (const other of document.querySelectorAll("nav button")) {
    other.setAttribute("aria-pressed", other === button);
    $(other.dataset.view).hidden = other !== button;
  }
  if (button.dataset.view === "samples") await listSamples();
});
$("curve-stage").onchange = $("curve-name").onchange = () => drawCurve();
$("load-stage").onchange = () => drawLoad();
$("time-stage").onchange = () => drawTime();
$("sample-stage").onchange = () => { at = -1; listed = null; shown = []; listSamples(); };
$("sample-task").onchange = $("sample-reward").onchange = () => filterSamples();
$("colour").onchange = () => sample && drawSample();
document.addEventListener("keydown", event => {
  const move = { j: 1, k: -1 }[event.key];
  if (move && !$("samples").hidden && !event.target.closest("select")) openSample(at + move);
});
refresh().then(() => { if (!inside) setInterval(refresh, EVERY); });
