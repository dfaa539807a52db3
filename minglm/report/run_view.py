"""Gather what the page of a run shows, from the run's folder alone: its log, its samples, its tokenizer (no section).

    RUN/log.jsonl              -> overview: stages, every number of every step, load of the experts by layer, scores; of a
                                  stage of RL who did what when in its last steps
    RUN/samples/STAGE.jsonl    -> one row a sample, and on demand one sample: its tokens with log-probabilities, the
                                  trainer's beside them, versions, experts; messages, parts of the reward

A run that trains appends to these files, so a `RunView` reads on from where it was. `static_page` puts
everything into one file of HTML, which needs no server and no network.

Simplified: a curve has at most `MOST_POINTS` points, evenly chosen; the static page has the last
`STATIC_SAMPLES` samples of each stage.
"""

import base64
import codecs
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.common.mistakes import read_from
from minglm.common.trace import TRAINER, Span, idle_share
from minglm.data.tokenizer import Tokenizer

JSONObject = dict[str, Any]

MOST_POINTS = 400
"""Points of a curve."""
TIME_LINE_STEPS = 6
"""Last steps of a stage of RL whose time line is shown."""
MOST_SPANS = 3000
"""Spans of a time line, the last ones."""
STATIC_SAMPLES = 60
"""Samples of each stage in a static page."""
ROUTED_TOKENS = 2048
"""Tokens of a segment whose experts are sent."""
NOT_CURVES = ("kind", "stage", "step", "tokens", "tier")
SCORES = ("evaluation", "bits_per_byte", "mtp_acceptance", "pathology", "needle")
"""Kinds of records that the page lists as they are."""
PAGE_FILES = ("view.html", "view.css", "view.js")


class Row(NamedTuple):
    """One sample in the list: where its line is, and what it can be found by."""

    offset: int
    length: int
    summary: JSONObject


class GrowingFile:
    """The JSON objects of a file that is appended to; each read continues where the last one ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def read(self) -> Iterator[tuple[int, bytes, JSONObject]]:
        """Yield (offset, line, object) of the new complete lines. A file that became shorter is read anew."""
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.position:
            self.position = 0
            yield 0, b"", {"kind": "again"}
        with open(self.path, "rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                offset = self.position
                self.position += len(line)
                try:
                    values = loaded(line)
                except ValueError:
                    continue  # a line that a killed run left; the log is cut there when it is resumed
                yield offset, line, values


class RunView:
    """The folder of a run, as the page sees it. Raises ValueError for a folder without a log."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.log = GrowingFile(self.run / "log.jsonl")
        if not self.log.path.is_file():
            raise ValueError(f"{self.run} holds no log.jsonl; give the --out of a run")
        self.files: dict[str, GrowingFile] = {}
        self.rows: dict[str, list[Row]] = {}
        self.tokenizer: Tokenizer | None = None
        self._forget()

    def _forget(self) -> None:
        self.name = self.run.resolve().name
        self.stages: dict[str, JSONObject] = {}
        self.steps: dict[str, list[JSONObject]] = {}
        self.scores: list[JSONObject] = []
        self.ended = False

    def overview(self) -> JSONObject:
        """Return everything but the samples."""
        with read_from(self.log.path):
            for _, _, record in self.log.read():
                self._take(record)
            of_stages = {
                "curves": {stage: curves(steps) for stage, steps in self.steps.items()},
                "loads": {stage: loads(steps) for stage, steps in self.steps.items()},
                "time_lines": {stage: time_line(steps) for stage, steps in self.steps.items()},
            }
        return {
            "name": self.name,
            "ended": self.ended,
            "stages": list(self.stages.values()),
            **of_stages,
            "scores": self.scores,
            "samples": {stage: len(self.samples(stage)) for stage in self.sampled_stages()},
        }

    def _take(self, record: JSONObject) -> None:
        """Note one record of the log."""
        kind = record.get("kind")
        stage = record.get("stage", "")
        if kind == "again":
            self._forget()
        elif kind == "start":
            self.name = record.get("name", self.name)
            self.ended = False
        elif kind == "end":
            self.ended = True
        elif kind == "stage_begin":
            self.stages[stage] = {
                "name": stage,
                "teaches": record.get("teaches", ""),
                "done": False,
            }
            self.steps[stage] = []
        elif kind == "stage_end":
            entry = self.stages.setdefault(stage, {"name": stage, "teaches": ""})
            entry |= {"done": True, "seconds": record.get("seconds")}
        elif kind in ("step", "rl"):
            self.stages.setdefault(stage, {"name": stage, "teaches": "", "done": False})
            self.steps.setdefault(stage, []).append(record)
        elif kind in SCORES:
            self.scores.append(
                {name: v for name, v in record.items() if name not in ("by_problem", "levels")}
            )

    def sampled_stages(self) -> list[str]:
        """Return the stages that have samples, in the order of the run."""
        found = {path.stem for path in (self.run / "samples").glob("*.jsonl")}
        order = list(self.stages)
        return sorted(
            found, key=lambda name: (order.index(name) if name in order else len(order), name)
        )

    def samples(self, stage: str) -> list[JSONObject]:
        """Return one summary for each sample of a stage. Raises ValueError for a stage without samples."""
        path = self.run / "samples" / f"{stage}.jsonl"
        if stage not in self.files:
            if path not in (self.run / "samples").glob("*.jsonl"):
                raise ValueError(f"the stage {stage!r:.80} has no samples")
            self.files[stage] = GrowingFile(path)
        rows = self.rows.setdefault(stage, [])
        with read_from(path):
            for offset, line, sample in self.files[stage].read():
                if sample.get("kind") == "again":
                    rows.clear()
                elif "segments" in sample:
                    rows.append(Row(offset, len(line), summary(sample)))
        return [row.summary for row in rows]

    def sample(self, stage: str, number: int) -> JSONObject:
        """Return one sample with its tokens. Raises ValueError if there is none."""
        count = len(self.samples(stage))
        if not 0 <= number < count:
            raise ValueError(f"stage {stage}: there is no sample {number}, of {count}")
        row = self.rows[stage][number]
        with open(self.files[stage].path, "rb") as file:
            file.seek(row.offset)
            sample = loaded(file.read(row.length))
        if self.tokenizer is None:
            self.tokenizer = Tokenizer.load(self.run / "data" / "tokenizer.json")
        shown = {
            name: value
            for name, value in sample.items()
            if name not in ("segments", "pieces", "texts")
        }
        with read_from(self.files[stage].path):
            shown["segments"] = [segment(values, self.tokenizer) for values in sample["segments"]]
        return shown


def loaded(line: bytes) -> JSONObject:
    """Return the object of a line; NaN and infinities, which JSON has not, are None.

    Raises ValueError if it holds none.
    """
    try:
        values = json.loads(line, parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("a line nests too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("a line holds no object")
    return values


def curves(steps: list[JSONObject]) -> JSONObject:
    """Return {"step": [...], number: [...], ...} of a stage: every field that is a number in some step."""
    chosen = thinned(steps)
    names: dict[str, None] = {}
    for step in chosen:
        names |= {name: None for name, value in step.items() if _is_number(value)}
    table = {name: [step.get(name) for step in chosen] for name in names if name not in NOT_CURVES}
    return {"step": [step.get("step", 0) for step in chosen], **table}


def loads(steps: list[JSONObject]) -> JSONObject:
    """Return the load of the busiest expert over the mean, and the entropy of the loads, by step and MoE layer."""
    measured = [step for step in thinned(steps) if step.get("load_max_over_mean")]
    names = ("load_max_over_mean", "load_entropy")
    table = {name: [step.get(name) for step in measured] for name in names}
    return {"step": [step["step"] for step in measured], **table} if measured else {}


def time_line(steps: list[JSONObject]) -> JSONObject:
    """Return who did what when in the last steps of a stage of RL; nothing for other stages.

    lanes: names, the trainer first. spans: [number of the lane, phase, began, ended], seconds from the first.
    busy: for each lane the share of the time of each of its phases, and "idle", the share of none.
    """
    last = steps[-TIME_LINE_STEPS:]
    spans = [Span(*span) for step in last for span in step.get("spans") or ()][-MOST_SPANS:]
    if not spans:
        return {}
    first = min(span.began for span in spans)
    lanes = sorted({span.lane for span in spans}, key=lambda lane: (lane != TRAINER, lane))
    busy = []
    for lane in lanes:
        phases = list(dict.fromkeys(span.phase for span in spans if span.lane == lane))
        shares = {phase: round(1 - idle_share(spans, lane, [phase]), 4) for phase in phases}
        busy.append({**shares, "idle": round(idle_share(spans, lane, phases), 4)})
    return {
        "steps": [last[0]["step"], last[-1]["step"]],
        "lanes": lanes,
        "spans": [
            [lanes.index(s.lane), s.phase, round(s.began - first, 4), round(s.ended - first, 4)]
            for s in spans
        ],
        "busy": busy,
    }


def thinned(steps: list[JSONObject]) -> list[JSONObject]:
    """Return at most `MOST_POINTS` steps, evenly chosen, the last one among them."""
    stride = -(-len(steps) // MOST_POINTS) or 1
    return steps[::-1][::stride][::-1]


def summary(sample: JSONObject) -> JSONObject:
    """Return what the list shows of a sample."""
    names = (
        "step",
        "place",
        "sample",
        "environment",
        "difficulty",
        "thinking",
        "reward",
        "advantage",
        "status",
    )
    sampled = sum(p is not None for part in sample["segments"] for p in part["logprobs"])
    calls = sum(len(message.get("tool_calls") or ()) for message in sample.get("messages", ()))
    return {name: sample.get(name) for name in names} | {"length": sampled, "calls": calls}


def segment(values: JSONObject, tokenizer: Tokenizer) -> JSONObject:
    """Return a segment as [text, engine's log-probability, trainer's, version] a token; None where there is none.

    A character of several tokens is the text of its last one.
    """
    utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
    trained = iter(values.get("trained", ()))
    versions = iter([v for v, count in values.get("versions", ()) for _ in range(count)])
    tokens = []
    for token, logprob in zip(values["tokens"], values["logprobs"], strict=True):
        text = utf8_decoder.decode(tokenizer.bytes([token]))
        if logprob is None:
            tokens.append([text, None, None, None])
        else:
            tokens.append([text, logprob, next(trained, None), next(versions, None)])
    return {"tokens": tokens, "experts": experts(values.get("experts"))}


def experts(stored: list[Any] | None) -> list[Any] | None:
    """Return the experts [token][layer][choice] of a segment's first tokens, None where they were not kept."""
    if stored is None:
        return None
    dtype, shape, text = stored
    array = np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
    return array[:ROUTED_TOKENS].tolist()


def page_file(name: str) -> str:
    """Return one of the page's own files."""
    return resources.files("minglm.report").joinpath("view", name).read_text(encoding="utf-8")


def static_page(view: RunView) -> str:
    """Return the page of a run as one file of HTML, with the data inside."""
    data: JSONObject = {"overview": view.overview(), "samples": {}, "sample": {}}
    for stage in view.sampled_stages():
        rows = view.samples(stage)
        first = max(0, len(rows) - STATIC_SAMPLES)
        data["samples"][stage] = rows[first:]
        data["sample"][stage] = [view.sample(stage, number) for number in range(first, len(rows))]
    # What the model wrote must not end the script.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes a question mark
    html, css, script = map(page_file, PAGE_FILES)
    html = html.replace('<link rel="stylesheet" href="view.css">', f"<style>\n{css}</style>")
    inside = (
        f'<script type="application/json" id="data">{text}</script>\n<script>\n{script}</script>'
    )
    return html.replace('<script src="view.js" defer></script>', "").replace(
        "</body>", f"{inside}\n</body>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
