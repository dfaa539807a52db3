"""Measure pathologies on prompts that provoke them: by the detectors of training, by others, and what is left of the content.

    fault      one of `rewards.pathology`, which training may punish                        (paper 3.4)
    flag       one of `rewards.audit`, which nothing in training reads
    content    share of what was asked for that holds: the constraints of a request, the fact that a prompt is about

A policy that is punished for faults can learn what their detectors overlook, or to say as little as possible. The flags show
the one and the content the other.

Choices: the prompts are held-out ones of the kinds that are mined, and not those that provoked a fault before: these would have
fewer the next time in any case. Clean texts are the oracle's answers to training tasks of the same kinds. Where these are sentences an answer has to be
one; otherwise it has to be made of their words, those of the language that was asked for.

Simplified: answers that are no sentences are taken to have few different words, as lists of numbers do.
"""

import re
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from minglm.common.statistics import interval
from minglm.envs.base import Environment
from minglm.rewards.audit import FLAGS, SENTENCE, CharacterModel, audit
from minglm.rewards.pathology import FAULTS
from minglm.rl.episode import Trajectory

CLEAN_TEXTS = 600  # of each kind; two in three are counted, the others calibrate
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]+")
MEASURES = ("fault", "flag", "content")


class Auditor:
    """Compares answers with the oracle's to other tasks of the same environments. seed: decides these."""

    def __init__(self, environments: Iterable[Environment], seed: int) -> None:
        self.characters: dict[str, CharacterModel] = {}
        """How usual the characters of answers in an environment are."""
        self.words: dict[tuple[str, str | None], set[str]] = {}
        """Words of the lists of an environment in a language; an environment of sentences has none."""
        for environment in environments:
            tasks = environment.tasks(CLEAN_TEXTS, seed)
            clean = [environment.demonstrate(task)[-1]["content"] for task in tasks]
            fitted = 2 * len(clean) // 3
            self.characters[environment.name] = CharacterModel(clean[:fitted], clean[fitted:])
            if all(SENTENCE.fullmatch(text) for text in clean):
                continue
            for task, text in zip(tasks, clean, strict=True):
                key = environment.name, task.expected_language
                self.words.setdefault(key, set()).update(WORD.findall(text.lower()))

    def flags(self, trajectory: Trajectory) -> dict[str, bool]:
        """Return the flags of the last answer of an episode, {name: bool}: those of `FLAGS`."""
        text = trajectory.last_answer()[1]["content"]
        task = trajectory.task
        flags = audit(text, self.characters[task.environment])
        known = self.words.get((task.environment, task.expected_language))
        if known is not None:
            said = WORD.findall(text.lower())
            flags["unfinished"] = not said or not known.issuperset(said)
        return flags


def content(trajectory: Trajectory) -> float:
    """Return how much of what was asked for holds: the share of the task's criteria, or without any the score."""
    score = trajectory.score
    if not trajectory.task.criteria:
        return score.value
    # An answer that was halted for its format has no parts, and nothing of it holds.
    return fmean(score.parts.get(name, 0.0) for name in trajectory.task.criteria)


def judged(trajectory: Trajectory, auditor: Auditor) -> dict[str, float]:
    """Return what is found in one answer: every fault and flag, 0 or 1, any "fault", any "flag", and the "content"."""
    faults = trajectory.faults()
    flags = auditor.flags(trajectory)
    found = {**faults, "fault": any(faults.values()), **flags, "flag": any(flags.values())}
    return {name: float(value) for name, value in found.items()} | {"content": content(trajectory)}


def measure(trajectories: Sequence[Trajectory], auditor: Auditor) -> dict[str, Any]:
    """Return the fields of a `PathologyRecord` for the answers to prompts, without its stage and moment.

    Samples whose environment failed are left out; `tasks` has refused episodes that all failed.
    """
    by_prompt: dict[str, list[dict[str, float]]] = {}
    by_kind: dict[str, list[dict[str, float]]] = {}
    for trajectory in trajectories:
        if trajectory.valid:
            row = judged(trajectory, auditor)
            by_prompt.setdefault(trajectory.task.id, []).append(row)
            by_kind.setdefault(trajectory.task.environment, []).append(row)
    rows = [row for group in by_prompt.values() for row in group]
    prompts = {name: [_mean(group, name) for group in by_prompt.values()] for name in MEASURES}
    low, high = interval(prompts["fault"])
    return {
        "incidence": {name: _mean(rows, name) for name in FAULTS} | {"any": _mean(rows, "fault")},
        "n": len(rows),
        "low": low,
        "high": high,
        "audit": {name: _mean(rows, name) for name in FLAGS} | {"any": _mean(rows, "flag")},
        "content": _mean(rows, "content"),
        "by_kind": {
            kind: {name: _mean(group, name) for name in MEASURES} for kind, group in by_kind.items()
        },
        "by_prompt": {
            name: [round(value, 4) for value in values] for name, values in prompts.items()
        },
    }


def _mean(rows: Sequence[dict[str, float]], name: str) -> float:
    return fmean(row[name] for row in rows)
