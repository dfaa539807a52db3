"""Write the report card of a run: RUN/report.md and RUN/figures/, from RUN/log.jsonl alone (paper section 4).

What a run must show is written down as six claims with their bounds (`minglm.report.claims`); the report begins with
their verdicts. Scores are avg@k with 95% intervals, as the evaluation logged them (the paper reports avg@k too).

Simplified: a run is one seed. Intervals are over problems and samples, and say nothing of another seed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from minglm.common.files import atomic_path
from minglm.common.log import Record
from minglm.common.mistakes import read_from
from minglm.common.trace import TRAINER, idle_share
from minglm.envs.twelve import GROUPS, averages
from minglm.report.claims import (
    CLAIMS,
    FINISHED,
    find_score,
    gains,
    paired,
    pathologies,
    percent,
    points,
    score_text,
)
from minglm.report.curves import FIGURES
from minglm.report.drawing import label, thousands
from minglm.report.records import (
    ORACLE,
    BitsPerByteRecord,
    ConversationsRecord,
    CurriculumRecord,
    DataRecord,
    EndRecord,
    EvaluationRecord,
    MiningRecord,
    MTPAcceptanceRecord,
    OnPolicyRecord,
    RejectionRecord,
    RewardModelRecord,
    RLRecord,
    SampleRecord,
    ScreeningRecord,
    StageBeginRecord,
    StageEndRecord,
    StartRecord,
    TemperatureRecord,
    read_records,
    select,
    stages_of,
)
from minglm.report.time_line import stage_spans

CAPTIONS = {
    "loss": "Loss over all stages. Stages that are small beside the largest are drawn wider than their share.",
    "load": "Load of the busiest expert over the mean, per MoE layer.",
    "scores": "Scores on held-out tasks after each stage.",
    "rl": "Reinforcement learning. One seed: the height of a curve may differ with another.",
    "time_line": "Trainer and rollouts over time, in the last steps of each stage. What is blank is idle.",
    "pathology": "Answers to held-out prompts of the kinds that were mined, before and after pathology RL.",
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
    """Format the head of the report: name, hash, seed, versions and time."""
    starts = select(records, StartRecord)
    if not starts:
        return "The log holds no start record.\n"
    start = starts[-1]  # a run that is continued keeps its first
    ends = select(records, EndRecord)
    rows: list[Row] = [("config", f"`{start.config_hash}`"), ("seed", start.seed)]
    rows += start.versions.items()
    minutes = f"{ends[-1].seconds / 60:.1f} minutes" if ends else "not finished"
    rows.append(("finished in", minutes))
    return f"# Run {start.name}\n\n" + table(("", ""), rows)


def claim_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a claim: name, measurement, verdict."""
    claims = [claim(records) for claim in CLAIMS]
    return [(claim.name, claim.measured, claim.verdict) for claim in claims]


GAIN_HEADER = (
    "task",
    "base",
    "cold start",
    "as much fine-tuning",
    "RL",
    "RL over the better start (95%)",
    "RL over the fine-tuning (95%)",
)


def gain_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a task that an expert was reinforced on: its scores and the paired differences."""
    rows: list[Row] = []
    for gain in gains(records):
        scores = (gain.base, gain.cold_start, gain.control, gain.expert)
        rows.append(
            (
                gain.env,
                *(percent(score.avg) if score else "" for score in scores),
                points(gain.over_start),
                points(gain.over_control) if gain.over_control else "",
            )
        )
    return rows


LEVEL_HEADER = (
    "task",
    "difficulty",
    "share of the demonstrations",
    "problems",
    "base",
    "cold start",
    "as much fine-tuning",
    "RL",
)


def level_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a difficulty of each task that an expert was reinforced on: was it shown, and the scores."""
    rows: list[Row] = []
    for gain in gains(records):
        for level in sorted(set(gain.expert.levels or ())):
            share = (gain.expert.shown_shares or {}).get(str(level))
            scores = (gain.base, gain.cold_start, gain.control, gain.expert)
            rows.append(
                (
                    gain.env,
                    level,
                    percent(share) if share else "never shown",
                    (gain.expert.levels or ()).count(level),
                    *(percent(level_score(score, level)) if score else "" for score in scores),
                )
            )
    return rows


def level_score(score: EvaluationRecord, level: int) -> float | None:
    """Return the mean score of the problems of a difficulty; None where none was scored."""
    pairs = zip(score.levels or (), score.by_problem or ())
    return mean(value for found, value in pairs if found == level)


def change_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a task and setting of the switch: what each stage of RL of the whole model changed."""
    rows: list[Row] = []
    for before, after in pairwise(FINISHED):
        for score in select(records, EvaluationRecord, stage=after):
            change = paired(find_score(records, before, score.env, score.thinking), score)
            if change is not None:
                mode = "thinking" if score.thinking else "direct"
                rows.append((label(after), score.env, mode, percent(score.avg), points(change)))
    return rows


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


GROUP_HEADER = ("after", "answers", *(f"{group}, mean of 4" for group in GROUPS), "mean of 12")


def group_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a stage and setting of the switch with a whole group of tasks: the averages of Figure 1."""
    rows: list[Row] = []
    for stage in stages_of(records, EvaluationRecord):
        for thinking in (True, False):
            found = select(records, EvaluationRecord, stage=stage, thinking=thinking)
            means = averages({score.env: score.avg for score in found})
            if means:
                mode = "thinking" if thinking else "direct"
                cells = [
                    percent(means[name]) if name in means else "" for name in (*GROUPS, "twelve")
                ]
                rows.append((label(stage), mode, *cells))
    return rows


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None without any."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


ON_POLICY_HEADER = ("stage", "steps", "tokens", "nats above the experts, first", "last")


def on_policy_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a stage of on-policy distillation: how far the student was from its experts (means of five steps)."""
    rows: list[Row] = []
    for stage in stages_of(records, OnPolicyRecord):
        steps = select(records, OnPolicyRecord, stage=stage)
        ends = (mean(step.reverse_kl for step in part) for part in (steps[:5], steps[-5:]))
        rows.append(
            (
                label(stage),
                len(steps),
                thousands(steps[-1].tokens),
                *(f"{end:.3f}" for end in ends),
            )
        )
    return rows


REWARD_MODEL_HEADER = (
    "phase",
    "preference pairs",
    "held-out pairs",
    "right",
    "wrong where the worse answer is longer",
    "wrong where it is shorter",
    "wrong where it is lively",
    "calibration error",
)
PATHOLOGY_HEADER = ("prompts", "provoke", "faults", "flagged by other detectors", "content")
SCREENING_HEADER = (
    "phase",
    "moderate",
    "extreme",
    "solved",
    "unsolved",
    "between",
    "answers",
    "pass rate (95%)",
    "in the second draw",
    "held out",
)
CURRICULUM_HEADER = ("phase", "after step", "score of the held-out", "before", "verdict")
TEMPERATURE_HEADER = (
    "phase",
    "plateau after step",
    "development problems",
    "score at each temperature",
    "shown to be within the drop",
    "temperature",
)


def total(values: Iterable[int | None]) -> int | str:
    """Return the sum of the values that are there, or 'n/a' without any."""
    present = [value for value in values if value is not None]
    return sum(present) if present else "n/a"


RL_HEADER = (
    "phase",
    "steps",
    "first reward",
    "last reward",
    "live groups",
    "groups drawn",
    "without signal",
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
                total(step.groups for step in steps),
                total(step.discarded for step in steps),
                percent(mean(step.truncated for step in steps)),
                percent(mean(step.clip_share for step in steps), 2),  # a skipped step clips nothing
                sum(step.skipped for step in steps),
            )
        )
    return rows


GAP_HEADER = (
    "phase",
    "gap mean, nats",
    "99% below",
    "worst",
    "KL, first step",
    "KL, last step",
    "other experts",
)


def gap_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row an RL stage: how far trainer and engine are apart, over all steps that learned something."""
    rows: list[Row] = []
    for stage in stages_of(records, RLRecord):
        steps = [s for s in select(records, RLRecord, stage=stage) if s.gap_mean is not None]
        if not steps:
            continue
        worst = max(step.gap_worst or 0.0 for step in steps)
        numbers = [mean(s.gap_mean for s in steps), mean(s.gap_p99 for s in steps), worst]
        numbers += [steps[0].gap_kl, steps[-1].gap_kl]
        replaced = mean(step.gap_routing for step in steps)
        share = "not kept" if replaced is None else percent(replaced, 2)
        rows.append((label(stage), *(f"{number:.1e}" for number in numbers), share))
    return rows


TIME_LINE_HEADER = ("phase", "lane", "of the time", "idle", "tokens by age in versions")


def time_line_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a lane of each RL stage: the share of each of its phases, what is left, and the age of its tokens."""
    rows: list[Row] = []
    for stage in stages_of(records, RLRecord):
        spans = stage_spans(records, stage)
        if not spans:
            continue
        ages: Counter[int] = Counter()
        for step in select(records, RLRecord, stage=stage):
            ages.update(dict(enumerate(step.staleness or [])))
        old = ", ".join(f"{age}: {percent(n / ages.total())}" for age, n in sorted(ages.items()))
        for lane in dict.fromkeys(span.lane for span in spans):
            phases = list(dict.fromkeys(s.phase for s in spans if s.lane == lane))
            shares = [f"{p} {percent(1 - idle_share(spans, lane, [p]))}" for p in phases]
            idle = percent(idle_share(spans, lane, phases))
            rows.append(
                (label(stage), lane, ", ".join(shares), idle, old if lane != TRAINER else "")
            )
    return rows


def reward_model_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a stage with a reward model: its pairs, and which others it gets wrong."""
    rows: list[Row] = []
    for found in select(records, RewardModelRecord):
        numbers = (
            found.accuracy,
            found.longer_wrong,
            found.shorter_wrong,
            found.lively_wrong,
            found.calibration_error,
        )
        shown = ("none" if number is None else percent(number) for number in numbers)
        rows.append((label(found.stage), f"{found.pairs:,}", f"{found.measured:,}", *shown))
    return rows


def screening_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a stage with a curriculum: the problems of each tier, and how they were measured."""

    def rate_text(rate: list[float] | None) -> str:
        if not rate:
            return "none"
        mean, low, high = rate
        return f"{percent(mean)} ({percent(low)} to {percent(high)})"

    rows: list[Row] = []
    for screening in select(records, ScreeningRecord):
        counts = [screening.tiers[tier] for tier in SCREENING_HEADER[1:6]]
        rates = (rate_text(screening.pass_rate), rate_text(screening.extreme_rate))
        answers = f"{screening.answers:,}"
        rows.append((label(screening.stage), *counts, answers, *rates, screening.held_out))
    return rows


def pathology_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a kind of prompts that was mined: what mining found, then faults, flags and content, before and after."""
    found = pathologies(records)
    if found is None:
        return []
    before, after = (record.by_kind or {} for record in found)
    mined = select(records, MiningRecord)
    rows: list[Row] = []
    for kind, first in before.items():
        changes = [f"{percent(first[name])} to {percent(after[kind][name])}" for name in first]
        share = "none"
        if mined:
            share = f"{mined[-1].provoking.get(kind, 0)} of {mined[-1].asked.get(kind, 0)}"
        rows.append((kind, share, *changes))
    return rows


def curriculum_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a check of the held-out moderate problems."""
    rows: list[Row] = []
    for check in select(records, CurriculumRecord):
        scores = (percent(check.score), percent(check.before))
        rows.append((label(check.stage), check.step, *scores, check.verdict))
    return rows


def temperature_rows(records: Sequence[Record]) -> list[Row]:
    """Return one row a probe: stage, step, the score of each temperature, and what followed."""
    rows: list[Row] = []
    for probe in select(records, TemperatureRecord):
        scores = [f"{temperature:g}: {percent(score)}" for temperature, score, _ in probe.probed]
        safe = [f"{temperature:g}" for temperature, _, cost in probe.probed if cost < 0]
        rows.append(
            (
                label(probe.stage),
                probe.step,
                probe.problems,
                ", ".join(scores),
                ", ".join(safe) or "none",
                f"{probe.verdict}: {probe.before:g} to {probe.after:g}"
                if probe.after != probe.before
                else f"{probe.verdict}: {probe.before:g}",
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


def oracle_text(records: Sequence[Record]) -> str:
    """Say so where the unified model learned answers that no expert gave; nothing where it did not."""
    lines = []
    for rejection in select(records, RejectionRecord):
        for what, count in rejection.counts.items():
            expert, _, reason = what.rpartition(": ")
            if reason == ORACLE and count:
                lines.append(f"**{count:,} {ORACLE}: expert `{expert}`.**\n")
    return "\n".join(lines)


def rejection_table(records: Sequence[Record]) -> str:
    """Format what rejection sampling did with the answers, a column for each environment of an expert."""
    counts: dict[str, dict[str, int]] = {}
    owners: dict[str, None] = {}
    for rejection in select(records, RejectionRecord):
        for name, count in rejection.counts.items():
            owner, _, what = name.rpartition(": ")
            owners[owner] = None
            counts.setdefault(what, {})[owner] = count
    rows = [
        (what, *(f"{found.get(owner, 0):,}" for owner in owners)) for what, found in counts.items()
    ]
    return table(("answers", *owners), rows)


CONVERSATIONS_HEADER = (
    "stage",
    "environment",
    "examples",
    "tokens",
    "of all tokens",
    "longer than a row, left out",
)


def conversations_rows(records: Sequence[Record]) -> list[Row]:
    """Return what each fine-tuning learned from, by environment."""
    rows: list[Row] = []
    for record in select(records, ConversationsRecord):
        tokens = record.tokens or {}
        whole = sum(tokens.values())
        for environment, examples in record.examples.items():
            own = tokens.get(environment, 0)
            row = (
                label(record.stage),
                environment,
                f"{examples:,}",
                thousands(own) if whole else "",
                percent(own / whole) if whole else "",
                f"{record.too_long.get(environment, 0):,}",
            )
            rows.append(row)
    return rows


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
    bits = [
        (label(r.stage), r.source, f"{r.value:.3f}") for r in select(records, BitsPerByteRecord)
    ]
    acceptance = [
        (label(r.stage), r.on, percent(r.value)) for r in select(records, MTPAcceptanceRecord)
    ]

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
            table(CONVERSATIONS_HEADER, conversations_rows(records)),
            table(("after", "source", "bits per byte"), bits),
            table(("after", "on", "MTP drafts accepted"), acceptance),
        ),
        section(
            "Scores",
            picture("scores"),
            table(GROUP_HEADER, group_rows(records)),
            table(score_header(records), score_rows(records)),
        ),
        section(
            "Reinforcement learning",
            table(GAIN_HEADER, gain_rows(records)),
            table(LEVEL_HEADER, level_rows(records)),
            table(("stage", "task", "answers", "score", "change (95%)"), change_rows(records)),
            picture("rl"),
            table(RL_HEADER, rl_rows(records)),
            table(REWARD_MODEL_HEADER, reward_model_rows(records)),
            table(SCREENING_HEADER, screening_rows(records)),
            table(CURRICULUM_HEADER, curriculum_rows(records)),
            table(TEMPERATURE_HEADER, temperature_rows(records)),
            table(GAP_HEADER, gap_rows(records)),
            picture("time_line"),
            table(TIME_LINE_HEADER, time_line_rows(records)),
            picture("pathology"),
            table(PATHOLOGY_HEADER, pathology_rows(records)),
        ),
        section("Rejection sampling", rejection_table(records), oracle_text(records)),
        section("On-policy distillation", table(ON_POLICY_HEADER, on_policy_rows(records))),
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
    with read_from(run_dir / "log.jsonl"):
        for name, draw in FIGURES.items():
            if draw(records, run_dir / "figures" / f"{name}.png") is not None:
                drawn.append(name)
    return drawn


def write(run_dir: str | Path) -> str:
    """Write report.md and the figures of a run folder from its log. Return a few lines for the terminal."""
    run_dir = Path(run_dir)
    drawn = draw_all(run_dir)
    records = read_run(run_dir)
    with read_from(run_dir / "log.jsonl"):
        text = markdown(records, drawn)
        with atomic_path(run_dir / "report.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        return f"{summary(records)}\nreport: {run_dir / 'report.md'}"


def summary(records: Sequence[Record]) -> str:
    """Format the claims for a terminal, one a line, with verdict and measurement."""
    lines = []
    for name, measured, verdict in claim_rows(records):
        lines.append(f"{verdict:>12}  {name}")
        if measured:
            lines.append(f"{'':14}{measured}")
    return "\n".join(lines)
