"""Write the report card of a run: RUN/report.md and RUN/figures/, from RUN/log.jsonl alone (paper section 4).

What a run must show is written down as five claims with their bounds (`minglm.report.claims`); the report begins with
their verdicts. Scores are avg@k with 95% intervals, as the evaluation logged them (the paper reports avg@k too).

Simplified: a run is one seed. Intervals are over problems and samples, and say nothing of another seed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from minglm.common.files import atomic_path
from minglm.common.log import Record
from minglm.report.claims import CLAIMS, find_score, percent, score_text
from minglm.report.curves import FIGURES
from minglm.report.drawing import label, thousands
from minglm.report.records import (
    BitsPerByteRecord,
    ConversationsRecord,
    DataRecord,
    EndRecord,
    EvaluationRecord,
    MTPAcceptanceRecord,
    RejectionRecord,
    RLRecord,
    SampleRecord,
    StageBeginRecord,
    StageEndRecord,
    StartRecord,
    read_records,
    select,
    stages_of,
)

CAPTIONS = {
    "loss": "Loss over all stages. Stages that are small beside the largest are drawn wider than their share.",
    "load": "Load of the busiest expert over the mean, per MoE layer.",
    "scores": "Scores on held-out tasks after each stage.",
    "rl": "Reinforcement learning. One seed: the height of a curve may differ with another.",
    "pathology": "Answers with a pathology on adversarial prompts, before and after pathology RL.",
    "time": "Where the time went.",
}
"""The caption of each figure, by its name in `minglm.report.curves.FIGURES`."""

Row = Sequence[object]


def table(header: Row, rows: Sequence[Row]) -> str:
    """Format a Markdown table, or nothing without rows; bars in cells are escaped."""
    if not rows:
        return ""
    lines = []
    for row in (header, ["---"] * len(header), *rows):
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def header_lines(records: Sequence[Record]) -> str:
    """Format the head of the report: name, hash, seed and versions; of a continued log those of its last start."""
    starts = select(records, StartRecord)
    if not starts:
        return "The log holds no start record.\n"
    start = starts[-1]
    ends = select(records, EndRecord)
    rows: list[Row] = [("config", f"`{start.config_hash}`"), ("seed", start.seed)]
    rows += start.versions.items()
    rows.append(("started", f"{len(starts)} times" if len(starts) > 1 else "once"))
    minutes = f"{ends[-1].seconds / 60:.1f} minutes" if ends else "not finished"
    rows.append(("finished in", minutes))
    return f"# Run {start.name}\n\n" + table(("", ""), rows)


def claim_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a claim: name, measurement, verdict."""
    claims = [claim(records) for claim in CLAIMS]
    return [(claim.name, claim.measured, claim.verdict) for claim in claims]


def score_header(records: Sequence[Record]) -> Row:
    """Return the header of the table of scores, with the number of answers where it is the same everywhere."""
    counts = {score.k for score in select(records, EvaluationRecord)}
    k = counts.pop() if len(counts) == 1 else "k"
    return (
        "group",
        "task",
        "after",
        f"avg@{k}, thinking (95%)",
        "without thinking",
        f"pass@{k}",
        "valid calls",
        "answer tokens",
        "problems x answers",
    )


def score_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a task and stage: avg@k and pass@k with thinking, avg@k without, valid calls, length."""
    scores = sorted(select(records, EvaluationRecord), key=lambda score: score.group)
    groups = {score.env: score.group for score in scores}
    rows: list[Row] = []
    for env, group in groups.items():
        for stage in stages_of(select(records, EvaluationRecord, env=env), EvaluationRecord):
            on = find_score(records, stage, env, thinking=True)
            off = find_score(records, stage, env, thinking=False)
            both = [score for score in (on, off) if score is not None]
            calls = [percent(s.valid_calls) for s in both if s.valid_calls is not None]
            rows.append(
                (
                    group,
                    env,
                    label(stage),
                    score_text(on) if on else "",
                    score_text(off) if off else "",
                    percent(both[0].pass_k),
                    " / ".join(calls),
                    " / ".join(f"{score.length:.0f}" for score in both),
                    f"{both[0].n} x {both[0].k}",
                )
            )
    return rows


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None without any."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


RL_HEADER = (
    "phase",
    "steps",
    "first reward",
    "last reward",
    "live groups",
    "truncated",
    "clipped",
    "skipped steps",
)


def rl_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row an RL stage: steps, reward at both ends (mean of five steps), and what went wrong."""
    rows: list[Row] = []
    for stage in stages_of(records, RLRecord):
        steps = select(records, RLRecord, stage=stage)
        rows.append(
            (
                label(stage),
                len(steps),
                reward_text(steps[:5]),
                reward_text(steps[-5:]),
                percent(mean(step.live_groups for step in steps)),
                percent(mean(step.truncated for step in steps)),
                percent(mean(step.clip_share for step in steps), 2),  # a skipped step clips nothing
                sum(step.skipped for step in steps),
            )
        )
    return rows


def reward_text(steps: Sequence[RLRecord]) -> str:
    """Format the mean reward of some steps; 'n/a' when every environment failed in all of them."""
    reward = mean(step.reward for step in steps)
    return "n/a" if reward is None else f"{reward:.3f}"


def cleaning_rows(records: Sequence[Record]) -> list[Row]:
    """Return what became of the documents: used, removed and why, repeated, records that could not be used."""
    rows: list[Row] = []
    for data in select(records, DataRecord):
        cleaning = data.cleaning
        rows.append(("used, repetitions included", f"{data.documents:,}"))
        rows.append(("exact copies, left out", f"{cleaning.get('exact_copies', 0):,}"))

        # Each of these counts documents by source.
        counts: dict[str, dict[str, int]] = {
            "evaluation items in them, left out": cleaning.get("decontamination", {}).get(
                "removed", {}
            )
        }
        for name in ("near_duplicates", "semantic_duplicates", "lowest_quality"):
            counts[f"{name.replace('_', ' ')}, left out"] = cleaning.get(name, {})
        counts["best quality, repeated"] = cleaning.get("repeated", {})
        for name, by_source in counts.items():
            if by_source:
                rows.append((name, f"{sum(by_source.values()):,}"))

        where = f", named in {data.skipped_log}" if data.skipped_log else ""
        rows.append((f"records that could not be used{where}", f"{data.skipped:,}"))
        for suffix, count in (data.not_read or {}).items():
            rows.append((f"files that are not read, {suffix}", f"{count:,}"))
    return rows


def time_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a stage: what it teaches, its seconds, its tokens."""
    teaches = {begin.stage: begin.teaches for begin in select(records, StageBeginRecord)}
    return [
        (
            label(end.stage),
            teaches.get(end.stage, ""),
            f"{end.seconds:.0f}",
            f"{end.evaluation_seconds:.0f}",
            thousands(end.tokens),
        )
        for end in select(records, StageEndRecord)
    ]


def section(title: str, *parts: str) -> str:
    """Format a section with its heading, or nothing when all its parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"\n## {title}\n\n{body}" if body else ""


def sample_text(records: Sequence[Record]) -> str:
    """Format the dialogues of the last stage that has any, fenced so that no fence inside a dialogue ends one."""
    stages = stages_of(records, SampleRecord)
    if not stages:
        return ""
    parts = []
    for sample in select(records, SampleRecord, stage=stages[-1]):
        fence = "```"
        while fence in sample.text:
            fence += "`"
        heading = f"**{sample.title}** ({label(sample.stage)})"
        parts.append(f"{heading}\n\n{fence}\n{sample.text}\n{fence}\n")
    return "\n".join(parts)


def markdown(records: Sequence[Record], figures: Sequence[str] = ()) -> str:
    """Format the report as Markdown; `figures` are the names of those that were drawn."""

    def picture(name: str) -> str:
        if name not in figures:
            return ""
        return f"![{CAPTIONS[name]}](figures/{name}.png)\n\n{CAPTIONS[name]}\n"

    sources: list[Row] = []
    for data in select(records, DataRecord):
        for source, tokens in data.tokens.items():
            sources.append((source, thousands(tokens)))
    rejections: list[Row] = []
    for rejection in select(records, RejectionRecord):
        rejections += rejection.counts.items()
    left_out = [
        (label(r.stage), environment, f"{count:,}", f"{r.examples[environment]:,}")
        for r in select(records, ConversationsRecord)
        for environment, count in r.too_long.items()
    ]
    bits = [
        (label(r.stage), r.source, f"{r.value:.3f}") for r in select(records, BitsPerByteRecord)
    ]
    acceptance = [(label(r.stage), percent(r.value)) for r in select(records, MTPAcceptanceRecord)]

    sections = [
        header_lines(records),
        section("Claims", table(("claim", "measured", "verdict"), claim_rows(records))),
        section(
            "Data",
            table(("source", "tokens"), sources),
            table(("documents", ""), cleaning_rows(records)),
        ),
        section(
            "Training",
            picture("loss"),
            picture("load"),
            table(("stage", "environment", "longer than a row, left out", "of"), left_out),
            table(("after", "source", "bits per byte"), bits),
            table(("after", "MTP drafts accepted"), acceptance),
        ),
        section("Scores", picture("scores"), table(score_header(records), score_rows(records))),
        section(
            "Reinforcement learning",
            picture("rl"),
            table(RL_HEADER, rl_rows(records)),
            picture("pathology"),
        ),
        section("Rejection sampling", table(("answers", "count"), rejections)),
        section("Samples", sample_text(records)),
        section(
            "Time",
            picture("time"),
            table(
                ("stage", "teaches", "training, s", "evaluation, s", "tokens"), time_rows(records)
            ),
        ),
    ]
    return "".join(sections)


def read_run(run_dir: Path) -> list[Record]:
    """Return the records of a run folder. Raises ValueError when it has no log."""
    records = read_records(run_dir / "log.jsonl")
    if not records:
        raise ValueError(f"{run_dir} holds no log.jsonl; give the folder of a run")
    return records


def draw_all(run_dir: str | Path) -> list[str]:
    """Draw every figure of a run folder from its log. Return the names drawn. Raises ValueError without a log."""
    run_dir = Path(run_dir)
    records = read_run(run_dir)
    drawn = []
    for name, draw in FIGURES.items():
        if draw(records, run_dir / "figures" / f"{name}.png") is not None:
            drawn.append(name)
    return drawn


def write(run_dir: str | Path) -> str:
    """Write report.md and the figures of a run folder from its log. Return a few lines for the terminal."""
    run_dir = Path(run_dir)
    drawn = draw_all(run_dir)
    records = read_run(run_dir)
    with atomic_path(run_dir / "report.md") as temporary:
        temporary.write_text(markdown(records, drawn), encoding="utf-8")
    return f"{summary(records)}\nreport: {run_dir / 'report.md'}"


def summary(records: Sequence[Record]) -> str:
    """Format the claims for a terminal, one a line, with verdict and measurement."""
    lines = []
    for name, measured, verdict in claim_rows(records):
        lines.append(f"{verdict:>12}  {name}")
        if measured:
            lines.append(f"{'':14}{measured}")
    return "\n".join(lines)
