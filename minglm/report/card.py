"""The report card of a run: RUN/report.md and RUN/figures/, from RUN/log.jsonl alone, and a few lines for the terminal.

What the end of a run has to show is written down as five claims with their bounds (`CLAIMS`), and each gets one of
three verdicts from the log: met, not met, not measured. Scores are avg@k, the mean over k answers to each of n held-out
problems, with 95% intervals as `minglm.eval.text` logged them (paper section 4 reports avg@k in the same way).

Simplifies: a run is one seed. Intervals speak of problems and samples, and say nothing of another seed.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from minglm.common.files import atomic_path, read_jsonl
from minglm.report.curves import FIGURES
from minglm.report.drawing import label, select, stages_of, thousands

GAIN, KEPT, VALID, FALL = 0.15, 0.90, 0.95, 5.0
EXPERTS = ("reasoning", "agent", "chat")
CAPTIONS = {
    "loss": "Loss over all stages. Stages that are small beside the largest are drawn wider than their share.",
    "load": "Load of the busiest expert over the mean, per MoE layer.",
    "scores": "Scores on held-out tasks after each stage.",
    "rl": "Reinforcement learning. One seed: the height of a curve may differ with another.",
    "pathology": "Answers with a pathology on provoking prompts, before and after pathology RL.",
    "time": "Where the time went.",
}


@dataclass(frozen=True)
class Claim:
    """One thing a run must show: its bound, what was measured, and the verdict met, not met or not measured."""

    name: str
    measured: str
    verdict: str


def verdict(holds):
    """met, not met, or (for None) not measured."""
    return {True: "met", False: "not met", None: "not measured"}[holds]


def percent(share, digits=1):
    """0.425 as '42.5%'; a missing or undefined share as 'n/a'."""
    return "n/a" if share is None or math.isnan(share) else f"{100 * share:.{digits}f}%"


def score_text(r):
    """'42.5% (38.1 to 46.9)' for an evaluation record."""
    return f"{percent(r['avg'])} ({100 * r['low']:.1f} to {100 * r['high']:.1f})"


def find_score(records, stage, env, thinking=True):
    """The last evaluation of a task after a stage, or None."""
    found = select(records, "evaluation", stage=stage, env=env, thinking=thinking)
    return found[-1] if found else None


def compare(records, before, after, env):
    """Scores of a task after two stages, with thinking where both have it, else without; None when neither does."""
    for thinking in (True, False):
        pair = [find_score(records, stage, env, thinking) for stage in (before, after)]
        if all(pair):
            return pair
    return None


def trained_envs(records, stage):
    """Tasks that a reinforcement stage trained on, in the order of its log."""
    return list(
        dict.fromkeys(env for r in select(records, "rl", stage=stage) for env in r["reward_by_env"])
    )


def claim_gain(records):
    """Reasoning RL lifts its expert by at least 15 points over cold-start SFT, intervals apart."""
    envs = trained_envs(records, "reasoning.rl")
    pairs = {env: compare(records, "reasoning.sft", "reasoning.rl", env) for env in envs}
    pairs = {env: pair for env, pair in pairs.items() if pair}
    holds = (
        all(b["avg"] - a["avg"] >= GAIN and b["low"] > a["high"] for a, b in pairs.values())
        if pairs
        else None
    )
    texts = [
        f"{env}: {score_text(a)} to {score_text(b)}, {100 * (b['avg'] - a['avg']):+.1f} points"
        for env, (a, b) in pairs.items()
    ]
    return Claim(
        "reasoning RL gains 15 points or more, intervals apart", "; ".join(texts), verdict(holds)
    )


def claim_kept(records):
    """The unified model keeps at least 90% of each expert's score on the tasks the expert was reinforced on."""
    holds, texts = [], []
    for expert in EXPERTS:
        for env in trained_envs(records, f"{expert}.rl"):
            pair = compare(records, f"{expert}.rl", "unified", env)
            if pair:
                best, unified = pair[0]["avg"], pair[1]["avg"]
                holds.append(best > 0 and unified >= KEPT * best)
                share = percent(unified / best, 0) if best else "nothing to keep"
                texts.append(f"{env} {share} ({percent(best)} to {percent(unified)})")
    text = ", ".join(texts)
    holds = all(holds) if holds else None
    return Claim("the unified model keeps 90% of each expert's score", text, verdict(holds))


def last_scores(records):
    """Evaluations of the finished model: of the last stage that has any, once the experts are unified."""
    stages = [
        s
        for s in stages_of(records, "evaluation")
        if s in ("unified", "general_rl", "pathology_rl")
    ]
    return select(records, "evaluation", stage=stages[-1]) if stages else []


def claim_calls(records):
    """Tool calls of the finished model are valid in at least 95% of cases, on every task with tools."""
    shares = {}
    for r in last_scores(records):
        if r.get("valid_calls") is not None:
            shares[r["env"]] = min(r["valid_calls"], shares.get(r["env"], 1.0))
    holds = min(shares.values()) >= VALID if shares else None
    text = ", ".join(f"{env} {percent(share)}" for env, share in shares.items())
    return Claim("valid tool calls in 95% of cases or more", text, verdict(holds))


def claim_pathology(records):
    """Pathology incidence falls by at least five times from a provoked start."""
    before, after = (select(records, "pathology", when=when) for when in ("before", "after"))
    if not before or not after:
        return Claim("pathologies fall five times or more", "", verdict(None))
    a, b = before[-1], after[-1]
    first, last = a["incidence"]["any"], b["incidence"]["any"]
    fall = f"{first / last:.1f} times" if last else f"to none in {b['n']}"
    ranges = [
        f"{percent(r['incidence']['any'])} ({100 * r['low']:.1f} to {100 * r['high']:.1f})"
        for r in (a, b)
    ]
    holds = first > 0 and last <= first / FALL
    return Claim(
        "pathologies fall five times or more", f"{ranges[0]} to {ranges[1]}: {fall}", verdict(holds)
    )


def claim_switch(records):
    """The finished model thinks when asked to and answers at once when not, every time."""
    shares = {
        (r["env"], r["thinking"]): r["switch_ok"]
        for r in last_scores(records)
        if r.get("switch_ok") is not None
    }
    holds = (
        min(shares.values()) == 1
        if shares and {thinking for _, thinking in shares} == {True, False}
        else None
    )
    failing = [
        f"{env}, {'on' if on else 'off'}: {percent(s)}" for (env, on), s in shares.items() if s < 1
    ]
    answers = sum(r["n"] * r["k"] for r in last_scores(records))
    text = "; ".join(failing) or (f"obeyed in all of {answers} answers" if shares else "")
    return Claim("the thinking switch works every time", text, verdict(holds))


CLAIMS = (claim_gain, claim_kept, claim_calls, claim_pathology, claim_switch)


def table(header, rows):
    """A Markdown table, or nothing without rows; bars in cells are escaped."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join(
            "| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines
        )
        + "\n"
    )


def header_lines(records):
    """Name, hash, seed and versions; a log that was continued shows its last start."""
    starts = select(records, "start")
    if not starts:
        return "The log holds no start record.\n"
    start, ends = starts[-1], select(records, "end")
    rows = [("config", f"`{start['config_hash']}`"), ("seed", start["seed"])]
    rows += [(name, value) for name, value in start["versions"].items()]
    rows.append(("started", f"{len(starts)} times" if len(starts) > 1 else "once"))
    rows.append(
        ("finished in", f"{ends[-1]['seconds'] / 60:.1f} minutes" if ends else "not finished")
    )
    return f"# Run {start['name']}\n\n" + table(("", ""), rows)


def score_rows(records):
    """One row a task and stage: avg@k and pass@k with thinking, avg@k without, valid calls, length."""
    rows = []
    groups = {
        r["env"]: r["group"]
        for r in sorted(select(records, "evaluation"), key=lambda r: r["group"])
    }
    for env, group in groups.items():
        for stage in stages_of(select(records, "evaluation", env=env), "evaluation"):
            on, off = find_score(records, stage, env), find_score(records, stage, env, False)
            one = on or off
            calls = [
                percent(r["valid_calls"])
                for r in (on, off)
                if r and r.get("valid_calls") is not None
            ]
            rows.append(
                (
                    group,
                    env,
                    label(stage),
                    score_text(on) if on else "",
                    score_text(off) if off else "",
                    percent(one["pass_k"]),
                    " / ".join(calls),
                    " / ".join(f"{r['length']:.0f}" for r in (on, off) if r),
                    f"{one['n']} x {one['k']}",
                )
            )
    return rows


def rl_rows(records):
    """One row a reinforcement stage: steps, reward at both ends (mean of five steps), and what went wrong."""
    rows = []
    for stage in stages_of(records, "rl"):
        steps = select(records, "rl", stage=stage)
        first, last = ([r["reward"] for r in part] for part in (steps[:5], steps[-5:]))
        known = [
            [r[name] for r in steps if name in r]
            for name in ("live_groups", "truncated", "clip_share")
        ]
        mean = [
            sum(values) / len(values) if values else None for values in known
        ]  # a skipped step clips nothing
        skipped = sum(bool(r["skipped"]) for r in steps)
        rows.append(
            (
                label(stage),
                len(steps),
                f"{sum(first) / len(first):.3f}",
                f"{sum(last) / len(last):.3f}",
                percent(mean[0]),
                percent(mean[1]),
                percent(mean[2], 2),
                skipped,
            )
        )
    return rows


def cleaning_rows(records):
    """What became of the documents that were read: used, left out and why, repeated, records that could not be used."""
    rows = []
    for about in select(records, "data"):
        done = about.get("cleaning", {})
        rows.append(("used, repetitions included", f"{about.get('documents', 0):,}"))
        rows.append(("exact copies, left out", f"{done.get('exact_copies', 0):,}"))
        removed = {
            "evaluation items in them, left out": done.get("decontamination", {}).get("removed", {})
        }
        removed |= {
            f"{name.replace('_', ' ')}, left out": done.get(name, {})
            for name in ("near_duplicates", "semantic_duplicates", "lowest_quality")
        }
        removed["best quality, repeated"] = done.get("repeated", {})
        rows += [(name, f"{sum(counts.values()):,}") for name, counts in removed.items() if counts]
        log = f", named in {about['skipped_log']}" if about.get("skipped_log") else ""
        rows.append((f"records that could not be used{log}", f"{about.get('skipped', 0):,}"))
    return rows


def section(title, *parts):
    """A section with its heading, or nothing when all its parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"\n## {title}\n\n{body}" if body else ""


def sample_text(records):
    """The dialogues of the last stage that has any, fenced so that no fence inside a dialogue ends one."""
    parts = []
    for r in select(records, "sample", stage=(stages_of(records, "sample") or [None])[-1]):
        fence = "```"
        while fence in r["text"]:
            fence += "`"
        parts.append(f"**{r['title']}** ({label(r['stage'])})\n\n{fence}\n{r['text']}\n{fence}\n")
    return "\n".join(parts)


def markdown(records, figures=()):
    """The report as Markdown; `figures` are the names of those that were drawn."""
    claims = [claim(records) for claim in CLAIMS]
    picture = {
        name: f"![{CAPTIONS[name]}](figures/{name}.png)\n\n{CAPTIONS[name]}\n" for name in figures
    }
    begins = {r["stage"]: r for r in select(records, "stage_begin")}
    bits = [
        (label(r["stage"]), r["source"], f"{r['value']:.3f}")
        for r in select(records, "bits_per_byte")
    ]
    acceptance = [
        (label(r["stage"]), percent(r["value"])) for r in select(records, "mtp_acceptance")
    ]
    times = [
        (
            label(r["stage"]),
            begins.get(r["stage"], {}).get("teaches", ""),
            f"{r['seconds']:.0f}",
            f"{r.get('evaluation_seconds', 0):.0f}",
            thousands(r["tokens"]),
        )
        for r in select(records, "stage_end")
    ]
    data = [row for r in select(records, "data") for row in r["tokens"].items()]
    data = [(source, thousands(tokens)) for source, tokens in data]
    kept = [row for r in select(records, "rejection") for row in r["counts"].items()]
    ks = sorted({r["k"] for r in select(records, "evaluation")})
    k = ks[0] if len(ks) == 1 else "k"
    scores = (
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
    rewards = (
        "phase",
        "steps",
        "first reward",
        "last reward",
        "live groups",
        "truncated",
        "clipped",
        "skipped steps",
    )
    return header_lines(records) + "".join(
        (
            section(
                "Claims",
                table(
                    ("claim", "measured", "verdict"),
                    [(c.name, c.measured, c.verdict) for c in claims],
                ),
            ),
            section(
                "Data",
                table(("source", "tokens"), data),
                table(("documents", ""), cleaning_rows(records)),
            ),
            section(
                "Training",
                picture.get("loss"),
                picture.get("load"),
                table(("after", "source", "bits per byte"), bits),
                table(("after", "MTP drafts accepted"), acceptance),
            ),
            section("Scores", picture.get("scores"), table(scores, score_rows(records))),
            section(
                "Reinforcement learning",
                picture.get("rl"),
                table(rewards, rl_rows(records)),
                picture.get("pathology"),
            ),
            section("Rejection sampling", table(("answers", "count"), kept)),
            section("Samples", sample_text(records)),
            section(
                "Time",
                picture.get("time"),
                table(("stage", "teaches", "training, s", "evaluation, s", "tokens"), times),
            ),
        )
    )


def draw_all(run_folder):
    """Redraw every figure of a run folder from its log. Returns the names drawn. Raises ValueError without a log."""
    folder = Path(run_folder)
    records = read_jsonl(folder / "log.jsonl")
    if not records:
        raise ValueError(f"{folder} holds no log.jsonl; give the folder of a run")
    return [
        name for name, draw in FIGURES.items() if draw(records, folder / "figures" / f"{name}.png")
    ]


def write(run_folder):
    """Write report.md and the figures of a run folder from its log. Returns a few lines for the terminal."""
    folder = Path(run_folder)
    drawn = draw_all(folder)
    records = read_jsonl(folder / "log.jsonl")
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text(markdown(records, drawn), encoding="utf-8")
    return f"{summary(records)}\nreport: {folder / 'report.md'}"


def summary(records):
    """The claims, one a line, with verdict and measurement."""
    claims = [claim(records) for claim in CLAIMS]
    return "\n".join(
        f"{c.verdict:>12}  {c.name}" + (f"\n{'':14}{c.measured}" if c.measured else "")
        for c in claims
    )
