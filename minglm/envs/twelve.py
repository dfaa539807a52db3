"""Average a model's scores over twelve tasks in three groups, as the paper's first figure does (paper 1, Figure 1).

    agentic      shop and airline, which answer calls; single calls, step by step; search in several turns
    reasoning    sums; questions of science; orders of people; one key among many
    coding       completion; functions from words; repair of a function; repair of a repository

The paper: TAU-bench, BFCL v3, BrowseComp; MMLU-Pro, AIME 24, MATH-500, SciCode, GPQA, HLE, LiveCodeBench;
SWE-bench Verified, Terminal-Bench. Ours are toys of the same kinds, so the number says which of two runs is
better, nothing about a model of the paper.

Choices: the mean of the twelve scores is not weighted by problems, as the paper's is not. A group whose tasks
were not all scored has no average: a mean over other tasks is another number.
"""

from collections.abc import Mapping
from statistics import fmean

GROUPS = {
    "agentic": ("retail", "airline", "functions", "search"),
    "reasoning": ("arithmetic", "science", "logic", "needle"),
    "coding": ("completion", "code", "repair", "swe"),
}
"""Group -> the environments in it."""


TWELVE = tuple(name for names in GROUPS.values() for name in names)


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Return {group: mean of the scores of its tasks}, and of all twelve as "twelve", as far as all of them are there.

    scores: {environment: avg@k}, of one stage and one setting of the thinking switch.
    """
    groups = {**GROUPS, "twelve": TWELVE}
    return {
        group: fmean(scores[name] for name in names)
        for group, names in groups.items()
        if scores.keys() >= set(names)
    }
