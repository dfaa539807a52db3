# %% [markdown]
# # 17 General RL: how is a reward hacked, what stops it, and how are faults cured that hardly ever occur?
#
# The last stages of GLM-4.5 reward what no single program can judge (paper 3.4). Instructions get a hybrid reward: rules, a
# critic that says which constraint is broken, a rubric, a reward model. Each can be fooled alone; the paper saw no reward
# hacking in a thousand steps of the composition (Figure 9). And a last, short stage cures pathologies (mixed languages,
# endless repetition, broken format), which are so rare that general RL hardly ever meets them, on prompts that provoke them.
#
# **Your prediction.** Write down first: (1) A rubric likes answers that are long, orderly and free of faults, and never looks
# at the request. How many steps until the policy has found that out, and what becomes of the constraints? (2) And beside rules,
# critic and reward model? (3) RL on 79 kinds of constraints: does it help with the 20 others? (4) Nothing is planted: how many
# answers of the finished model have a fault, on prompts as it was shown and on others? With three prompts in four mined from
# these, how many fewer samples does RL need than with as many, or one in sixteen, not mined? And do other detectors agree?
#
# **Equation** (paper 3.4; `minglm/rewards/hybrid.py`, `minglm/rewards/shaping.py`, `minglm/eval/pathologies.py`)
#
#     reward = sum_k w_k part_k / sum_k w_k                 parts: rules, critic, rubric, reward model, each logged
#     shaped = reward - penalty * [the answer has a fault]          judged by detectors that no reward uses, and on content

# %%
import copy
import dataclasses
import random
import re

import numpy as np
from tqdm import tqdm

from minglm import lesson
from minglm.common.statistics import interval
from minglm.config import EvaluationConfig, MiningConfig, RewardConfig, RLConfig, Split
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import user
from minglm.envs.constraints.environment import Constraints, UnseenConstraints
from minglm.envs.pathology import CATALOGUE, PathologyPrompts
from minglm.eval.pathologies import Auditor, judged
from minglm.eval.tasks import tasks
from minglm.model.glm import GLM
from minglm.recipe.preferences import LIVELY
from minglm.report import drawing
from minglm.rewards import reward_model
from minglm.rewards.hybrid import PARTS, Grader, weighted
from minglm.rewards.judge import Item
from minglm.rewards.reward_model import Pair, RewardModel, judged_tokens
from minglm.rewards.rubric import FORM
from minglm.rl.grading import grade
from minglm.rl.loop import draw_groups
from minglm.rl.mining import has_fault, mine
from minglm.rl.schedule import TaskSchedule
from minglm.rl.screening import Screener

VOCABULARY = 640
MODEL = dataclasses.replace(lesson.REASONER, vocab_size=VOCABULARY)
TRAINED, UNSEEN = Constraints(), UnseenConstraints()
TRAINED.default_difficulties = UNSEEN.default_difficulties = (1, 2)
REWARDS = {  # arm: weights of the parts
    "rubric alone": RewardConfig(rules=0.0, rubric=1.0),
    "reward model alone": RewardConfig(rules=0.0, reward_model=1.0),
    "all four alike": RewardConfig(rules=1.0, critic=1.0, rubric=1.0, reward_model=1.0),
    "rules and critic first": RewardConfig(rules=1.0, critic=1.0, rubric=0.1, reward_model=0.1),
}
SHADES = {
    "rubric alone": "#c2571a",
    "reward model alone": "#8a8a92",
    "all four alike": "#dfa27c",
    "rules and critic first": "#1f5fa8",
}
MIXES = {  # arm: prompts that take the place of short requests, and of how many
    "mined": ("provoking", 3 / 4),
    "not mined": ("asked", 3 / 4),
    "mixed in": ("asked", 1 / 16),
}
MIX_SHADES = {"mined": "#1f5fa8", "not mined": "#2f8f83", "mixed in": "#c2571a"}
TEMPERATURES = (0.6, 1.0, 1.3)
KIND_SHADES = {
    "ordinary prompts": "#1f5fa8",
    "unusual prompts": "#c2571a",
    "short requests": "#8a8a92",
    "long requests": "#2f8f83",
}
SIZES = {
    "tokens": 300_000,
    "rate": 0.02,
    "pairs": 800,
    "pairs_lr": 3e-3,
    "steps": 30,
    "prompts": 12,
    "samples": 8,
    "rl_rate": 8e-4,
    "every": 15,
    "problems": 100,
    "fault_tokens": 150_000,
    "fault_rate": 0.02,
    "fault_steps": 30,
    "fault_prompts": 16,
    "fault_samples": 4,
    "fault_every": 10,
    "prompts_asked": 60,
    "answers": 6,
    "mining_answers": 4,
}
SMOKE = SIZES | {
    "tokens": 6000,
    "pairs": 32,
    "steps": 1,
    "prompts": 2,
    "samples": 2,
    "every": 1,
    "problems": 3,
    "fault_tokens": 4096,
    "fault_steps": 1,
    "fault_prompts": 2,
    "fault_samples": 2,
    "fault_every": 1,
    "prompts_asked": 3,
    "answers": 1,
    "mining_answers": 1,
}

# %% [markdown]
# ## The lines that matter
# `main` prints them from minglm itself: the composition of the parts, and what is found in an answer.
#
# ## The start
# A cold start on requests for number words under one or two constraints beside their count (`minglm.envs.constraints`), of 79
# kinds. Twenty kinds are in no demonstration and no prompt of RL: `unseen_constraints` asks for at least one of them.
#
#     Write 3 or more numbers. Smallest first. With bars.        think: 1 two 2 four 3 nine       two | four | nine


# %%
def words_of(judged):
    """Return the words of an answer."""
    return re.findall(r"[a-z]+|[\u4e00-\u9fff]", judged.message["content"].lower())


HACKABLE = (
    Item("rich", "Does the answer list five words or more?", lambda j: len(words_of(j)) >= 5),
    Item("full", "Does it list eight words or more?", lambda j: len(words_of(j)) >= 8),
    Item("varied", "Are four of them different?", lambda j: len({*words_of(j)}) >= 4),
    *FORM,
)
"""A rubric that never looks at the request."""


def learn_words():
    """Return a tokenizer of what the requests and the provoking prompts are made of."""
    texts = []
    for environment in (TRAINED, UNSEEN, PathologyPrompts()):
        for task in environment.tasks(400, 0):
            for message in environment.demonstrate(task):
                texts += [message["content"], message.get("reasoning_content") or ""]
    return Tokenizer.train(texts, VOCABULARY)


def settings(sizes, **changes):
    """Return the settings of a stage of RL."""
    return RLConfig(
        environments=("constraints",),
        steps=10**6,
        prompts=sizes["prompts"],
        samples=sizes["samples"],
        max_new_tokens=48,
        peak_lr=sizes["rl_rate"],
        **changes,
    )


def preferring(start, words, sizes, seed):
    """Train a reward model on the oracle's answers and answers that break one constraint. Return it and its quality."""
    rng = random.Random(seed)
    pairs = []
    for task in TRAINED.tasks(int(1.5 * sizes["pairs"]), seed + 10**6):
        worse = TRAINED.spoilt(task, rng)
        if worse is not None:
            better = TRAINED.oracle(task, task.messages, rng)
            lively = {**worse, "content": LIVELY + worse["content"]}
            answers = (better, worse, lively)
            texts = [judged_tokens(words, task.messages, answer) for answer in answers]
            pairs.append(Pair(*texts))
    quarter = len(pairs) // 6
    model = RewardModel(start, words.pad)
    reward_model.train(model, pairs[2 * quarter :], sizes["pairs_lr"], seed)
    reward_model.calibrate(model, pairs[:quarter])
    return model, reward_model.measure(model, pairs[quarter : 2 * quarter])._asdict()


# %% [markdown]
# ## Experiment 1: a rubric that can be hacked, and its cure (Figure 9)
# Four rewards on the same prompts. All parts are measured in all arms, on test requests of trained and of unseen kinds, also
# those that an arm does not learn from. Partial is the share of the constraints that hold, strict is whether all do.


# %%
def measure(policy, everything, sizes):
    """Return the mean of each part on test requests of trained and of unseen kinds."""
    found = {}
    for environment in (TRAINED, UNSEEN):
        trajectories = policy.evaluate(environment, sizes["problems"]).trajectories
        strict = float(np.mean([t.score.value for t in trajectories]))
        grade(everything, {environment.name: environment}, policy.tokenizer, trajectories)
        # An answer that was halted for its format has no parts, and earns nothing.
        means = {
            name: float(np.mean([t.score.parts.get(name, 0.0) for t in trajectories]))
            for name in PARTS
        }
        length = float(np.mean([t.length for t in trajectories]))
        found[environment.name] = {"strict": strict, "length": length, **means}
    return found


def everything_of(preferred):
    """Return a grader that looks at every part, for measuring."""
    return Grader(REWARDS["all four alike"], preferred, rubric=HACKABLE)


def instruct(start, arm, preferred, words, sizes, seed):
    """Reinforce with the reward of one arm. Return what was measured on the way."""
    policy = lesson.Policy(start, settings(sizes), seed, words)
    policy.trainer.grader = Grader(REWARDS[arm], preferred, rubric=HACKABLE)
    everything = everything_of(preferred)
    points = []
    rewards = []
    for step in range(sizes["steps"]):
        rewards.append(policy.step(TRAINED).reward)
        if (step + 1) % sizes["every"] == 0:
            points.append(measure(policy, everything, sizes))
    found = policy.evaluate(TRAINED, 3).trajectories
    examples = [[t.messages[0]["content"], t.messages[-1]["content"]] for t in found]
    return {"arm": arm, "points": points, "rewards": rewards, "examples": examples}


# %% [markdown]
# ## Experiment 2: pathologies in the wild
# Nothing is planted. The finished model has learned the requests above and replies to prompts about eight things, ordinary ones
# ("Tell me about iron."), and one time in ten unusual ones: to say a word for ever, brackets that never close, a request in
# one language for an answer in the other. All were answered well. Requests had one or two constraints. Then it is asked what it
# seldom or never saw, unusual prompts and requests of four or five constraints, and what goes wrong is counted.
#
# **Mining**: its own answers to some of these prompts (about four of the things, and training requests) say which provoke it.
# Three mixes of RL with a penalty of 1 for a fault, on as many samples: three in four of the prompts mined; as many of the same
# kinds, not mined; or one in sixteen of these, in general RL. They learn by the detectors of `rewards.pathology`. They are
# judged on prompts about the other four things and on test requests, by the audit (compression, a model of characters, a
# grammar of sentences, the words of a list), and on content: the fact, in the language that was asked for, or the share of
# the constraints that hold.


# %%
HALVES = {
    "mined": re.compile(r"\b(iron|oxygen|france|cat)\b", re.IGNORECASE),
    "judged": re.compile(r"\b(gold|neon|japan|dog)\b", re.IGNORECASE),
}
"""What the prompts are about: few things, so that a small model can know them; mined by one half, judged by the other."""
ORDINARY, UNUSUAL = (1,), (2, 3)


class About(PathologyPrompts):
    """The prompts of `PathologyPrompts` about a few things, of some difficulties."""

    def __init__(self, halves, difficulties):
        self.default_difficulties = difficulties
        self.prompts = {}
        for difficulty, entries in CATALOGUE.items():
            self.prompts[difficulty] = [
                prompt
                for prompt, entry in entries.items()
                if any(HALVES[half].search(entry.replies["en"]) for half in halves)
            ]

    def draw(self, rng, difficulty):
        """Return one random prompt as (messages, language of a good reply)."""
        prompt = rng.choice(self.prompts[difficulty])
        return [user(prompt)], CATALOGUE[difficulty][prompt].language


class LongRequests(Constraints):
    """Requests with more constraints than fine-tuning shows."""

    name = "long_requests"
    default_difficulties = (4, 5)


SHOWN = About(("mined", "judged"), 18 * ORDINARY + UNUSUAL)
LONG = LongRequests()
KINDS = {  # what the finished model is asked
    "ordinary prompts": (About(("judged",), ORDINARY), Split.TRAIN),
    "unusual prompts": (About(("judged",), UNUSUAL), Split.TRAIN),
    "short requests": (TRAINED, Split.TEST),
    "long requests": (LONG, Split.TEST),
}
PROVOKING = ("unusual prompts", "long requests")
"""Those of which some are mined."""


def finish(start, words, sizes, seed):
    """Return the general model: fine-tuned on good replies to prompts, most of them ordinary, and on some requests."""
    conversations = []
    for index, task in enumerate(SHOWN.tasks(1200, seed)):
        conversations.append(SHOWN.demonstrate(task))
        if index % 3 == 0:
            conversations.append(TRAINED.demonstrate(TRAINED.task(index, seed + 1)))
    model = copy.deepcopy(start)
    tokens = sizes["fault_tokens"]
    lesson.imitate(model, conversations, tokens, sizes["fault_rate"], seed, words)
    return model


def answer(policy, environment, split, problems, samples, temperature=1.0):
    """Return the answers to different problems, one problem after the other."""
    config = EvaluationConfig(
        max_new_tokens=policy.config.max_new_tokens,
        problems=problems,
        samples=samples,
        split=split,
        temperature=temperature,
        top_p=1.0,
    )
    return tasks(policy.generator, policy.tokenizer, environment, config).trajectories


def examine(policy, auditor, kind, sizes, temperature=1.0):
    """Return what the answers to prompts of one kind are like: shares, and the interval of those with a fault."""
    environment, split = KINDS[kind]
    problems = sizes["prompts_asked"], sizes["answers"]
    rows = []
    for trajectory in answer(policy, environment, split, *problems, temperature):
        rows.append(judged(trajectory, auditor))
    shares = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    found = [row["fault"] for row in rows]
    count = sizes["answers"]
    low, high = interval([found[at : at + count] for at in range(0, len(found), count)])
    return {**shares, "n": len(rows), "low": low, "high": high}


def provoked(policy, sizes, seed):
    """Ask prompts of the mined half and long requests. Return which the model answers with a fault, by its own samples."""
    kinds = {SHOWN.name: About(("mined",), UNUSUAL), LONG.name: LONG}
    config = MiningConfig(pool=sizes["prompts_asked"], answers=sizes["mining_answers"])
    with tqdm(disable=True) as bar:
        screener = Screener(policy.player(), kinds, seed, None, bar, counts=has_fault)
        return mine(screener, config, thinking_share=1.0)


def cure(start, arm, mined, wild, auditor, words, sizes, seed):
    """Reinforce on one mix of prompts, with the penalty. Return what was measured on the way, over samples used.

    wild: what was measured before.
    """
    sizes = sizes | {"prompts": sizes["fault_prompts"], "samples": sizes["fault_samples"]}
    policy = lesson.Policy(start, settings(sizes, fault_penalty=1.0), seed, words)
    which, share = MIXES[arm]
    schedule = TaskSchedule(
        {each.name: each for each in (SHOWN, LONG, TRAINED)},
        (TRAINED.name,),
        sizes["prompts"],
        seed,
        chosen=getattr(mined, which),
        chosen_share=share,
    )
    points = [{kind: wild[kind]["1.0"] for kind in PROVOKING}]
    for step in range(sizes["fault_steps"]):
        groups = draw_groups(policy.trainer, policy.player(), schedule, step).groups
        policy.trainer.learn(groups, step)
        policy.trainer.state.step += 1
        policy.generator.update_weights(policy.trainer.model.state_dict(), step + 1)
        if (step + 1) % sizes["fault_every"] == 0:
            points.append({kind: examine(policy, auditor, kind, sizes) for kind in PROVOKING})
    others = [kind for kind in KINDS if kind not in PROVOKING]
    kept = {kind: examine(policy, auditor, kind, sizes) for kind in others}
    return {"arm": arm, "points": points, "kept": kept}


def instructed(seed, start, words, sizes):
    """Make the runs of the first experiment."""
    preferred, quality = preferring(start, words, sizes, seed)
    policy = lesson.Policy(start, settings(sizes), seed, words)
    return {
        "reward_model": quality,
        "before": measure(policy, everything_of(preferred), sizes),
        "rewards": [instruct(start, arm, preferred, words, sizes, seed) for arm in REWARDS],
    }


def cured(seed, start, words, sizes):
    """Make the runs of the second experiment."""
    auditor = Auditor((About(HALVES, ORDINARY + UNUSUAL), TRAINED, LONG), seed + 7)
    finished = finish(start, words, sizes, seed)
    policy = lesson.Policy(finished, settings(sizes), seed, words)
    wild = {
        kind: {
            str(temperature): examine(policy, auditor, kind, sizes, temperature)
            for temperature in TEMPERATURES
        }
        for kind in KINDS
    }
    mined = provoked(policy, sizes, seed)
    return {
        "wild": wild,
        "mined": [len(mined.provoking), len(mined.asked)],
        "mixes": [cure(finished, arm, mined, wild, auditor, words, sizes, seed) for arm in MIXES],
    }


def start_of(seed, words, sizes):
    """Return the model after the cold start."""
    start = GLM(MODEL, seed)
    lesson.cold_start(start, TRAINED, sizes["tokens"], sizes["rate"], seed, tokenizer=words)
    return start


def run(seed, sizes):
    """Make all runs of one seed."""
    words = learn_words()
    start = start_of(seed, words, sizes)
    first = instructed(seed, start, words, sizes)
    return {"seed": seed, **first, **cured(seed, start, words, sizes)}


def experiment(sizes, seeds):
    """Make all runs."""
    return {"runs": [run(seed, sizes) for seed in tqdm(range(seeds), desc="seeds", disable=None)]}


# %%
def curve(log, arm, kinds, name):
    """Return a measure of one arm along the steps, in percent: (seeds, points). kinds: name of the environment."""
    found = []
    for run in log["runs"]:
        found += [[run["before"], *r["points"]] for r in run["rewards"] if r["arm"] == arm]
    return 100 * np.array([[point[kinds][name] for point in points] for points in found])


def mixed(log, arm, name):
    """Return a measure of one mix along the steps, the mean of what provokes, in percent: (seeds, points)."""
    found = [r["points"] for run in log["runs"] for r in run["mixes"] if r["arm"] == arm]
    means = [[np.mean([row[name] for row in point.values()]) for point in run] for run in found]
    return 100 * np.array(means)


def wild(log, kind, name):
    """Return a measure of the finished model over the temperatures, in percent: (seeds, temperatures)."""
    return 100 * np.array(
        [[row[name] for row in run["wild"][kind].values()] for run in log["runs"]]
    )


def draw(log):
    """Draw the figure from the log alone."""
    sizes = log["sizes"]
    figure, (first, second, third, fourth) = drawing.canvas(4, 2, (10.5, 13))
    x = np.arange(0, sizes["steps"] + 1, sizes["every"])
    panels = (
        (first[0], TRAINED, "strict", "Figure 9: trained kinds, all constraints hold"),
        (first[1], UNSEEN, "strict", "Unseen kinds, all constraints hold"),
        (second[0], TRAINED, "rubric", "What the rubric says (trained kinds)"),
        (second[1], UNSEEN, "critic", "Constraints that hold (unseen kinds)"),
    )
    for axis, environment, name, heading in panels:
        axis.set_ylim(-2, 40 if name == "strict" else 100)
        values = {arm: curve(log, arm, environment.name, name) for arm in REWARDS}
        lesson.arms(axis, x, values, SHADES)
        lesson.panel(axis, heading, "step", "%")
    axis = third[0]
    axis.set_ylim(0, 50)
    lesson.arms(axis, TEMPERATURES, {kind: wild(log, kind, "fault") for kind in KINDS}, KIND_SHADES)
    lesson.panel(axis, "Faults in the wild, nothing planted", "temperature", "answers (%)")
    samples = sizes["fault_prompts"] * sizes["fault_samples"] * sizes["fault_every"]
    for axis, name, heading in (
        (third[1], "fault", "RL: faults by the detectors of training"),
        (fourth[0], "flag", "Flagged by the audit"),
        (fourth[1], "content", "Facts that are right, constraints that hold"),
    ):
        axis.set_ylim(0, 70)
        values = {arm: mixed(log, arm, name) for arm in MIXES}
        x = samples * np.arange(len(next(iter(values.values()))[0]))
        lesson.arms(axis, x, values, MIX_SHADES)
        lesson.panel(axis, heading, "samples", "unusual prompts, long requests (%)")
    return figure


# %% [markdown]
# ## What would prove us wrong
# `verdicts` reads the log, and each claim can come out False.
#
# Measured (152 CPU-seconds, three seeds; 100 test requests and 120 test answers each, so 4 points are noise). **Alone, the
# rubric is hacked in 30 steps**: its share rises from 56, 55 and 56% to 82, 85 and 77, while the constraints that hold fall
# from 62, 63 and 62% to 27, 29 and 30 and the requests obeyed from 22, 23 and 24% to 3, 4 and 3. Answers grow from 19 to 35
# tokens; asked for an even count of numbers between 4 and 12, the policy of seed 0 says twelve words. **Alone, the reward model
# is hacked as well**: what it says rises from 59, 58 and 57% to 86, 85 and 93, and 1, 3 and 4% of the requests are obeyed. It
# had learned from 800 pairs that spoilt answers often lack a word: where the worse answer was the longer one it preferred it
# in 95, 70 and 77% of the pairs. **Composition as such is no cure**: with four equal weights the two parts that are easy to
# please rise, and 12, 8 and 14% are obeyed. With rules and critic at ten times their weight nothing is hacked, and in 30
# steps little is gained: 19, 26 and 25% of trained kinds. Of unseen kinds it is 13, 18 and 11% (12, 12 and 6 before), and of
# their constraints 53, 58 and 54% hold (48, 50 and 53). That goes up in every seed, but by no more than chance may do (10 to
# 14% of all 300 requests, with a standard error of 2.6 points). So we can show what stops the hacking, and not the
# rise of the paper's Figure 9.
#
# **In the wild, nothing planted** (temperature 1; 120, 288, 360 and 360 answers a seed): 0, 0 and 0% of the answers to
# ordinary prompts have a fault, 4, 4 and 3% to unusual ones, 4, 5 and 5% to short requests, and 25, 29 and 20% to long
# ones. Heat adds: at 1.3 it is 0, 2 and 2, 14, 9 and 7, 10, 14 and 13, and 34, 36 and 34%. They are broken formats and
# mixed languages. Of 103 prompts 32, 34 and 38 are mined. **RL on what was mined cures what is frequent**: on test
# requests the faults fall from 25, 29 and 20% to 14, 7 and 8 in 1,920 samples, the flags of the audit from 52, 48 and 33%
# to 35, 29 and 18, and more constraints hold (22, 24 and 24% to 29, 32 and 31). **It is the kind that matters, not the
# mining**: as many prompts of the same kinds that were not mined leave 12, 9 and 7% faults, 35, 29 and 21% flags and 28,
# 30 and 28% of the constraints. One in sixteen of these in general RL leaves 21, 15 and 14%, 44, 33 and 28% and 25, 29
# and 28%. **What is rare stays**: unusual prompts have 4, 4 and 3% faults before and 2, 3 and 4 after, and their facts
# are right in 68, 66 and 68% before and in 65, 68 and 59 after. 282.3 CPU-seconds, of which 152 are of a run whose first
# experiment is kept here.
#
# Tried before: prompts about 24 things, whose answers so small a model had not learned (6% right); fine-tuning that never shows
# an unusual prompt (27 to 54% faults, 6 to 12% right).
#
# ## At full scale
# `posttraining.chat.rl.reward` and `general_rl.reward` name the parts and their weights; `judge = model` asks a model in place of
# a program. `pathology_rl.mining` names the kinds of prompts that are asked before the stage, and mines them as above.
#
# ## Exercise
# Give the hackable rubric a tenth of the weight of the rules, and no critic. Is that enough? Check: the rubric's share and the
# strict score over the steps, side by side.


# %%
def verdicts(log):
    """Return {claim: whether the log supports it}."""
    rubric, preferred, alike, composed = REWARDS
    trained, unseen = TRAINED.name, UNSEEN.name

    def shown(values):
        return np.round(values, 1).tolist()

    def gain(arm, kinds, name):
        values = curve(log, arm, kinds, name)
        return values[:, -1] - values[:, 0]

    claims = {}
    rise, fall = gain(rubric, trained, "rubric"), gain(rubric, trained, "critic")
    claim = f"alone, the rubric is hacked: it rises by {shown(rise)} points while constraints that hold change by {shown(fall)}"
    claims[claim] = (rise > 10).all() and (fall < 0).all()
    change = gain(preferred, trained, "strict")
    claims[f"alone, the reward model helps: strict {shown(change)} points"] = (change > 0).all()
    change = gain(alike, trained, "strict")
    claims[f"all four alike are a cure: strict {shown(change)} points"] = (change > 0).all()
    change = gain(composed, trained, "strict")
    claims[f"all four parts raise trained kinds: strict {shown(change)} points"] = (
        change > 0
    ).all()
    change = gain(composed, unseen, "strict")
    claims[f"and unseen kinds: strict {shown(change)} points"] = (change > 0).all()
    change = gain(composed, unseen, "critic")
    claims[f"and their constraints one by one: {shown(change)} points"] = (change > 0).all()
    at = list(TEMPERATURES).index(1.0)
    usual, unusual, short, long = (wild(log, kind, "fault")[:, at] for kind in KINDS)
    claims[
        f"in the wild fewer than 1% of answers to ordinary prompts have a fault: {shown(usual)}%"
    ] = (usual < 1).all()
    claim = f"unusual prompts provoke more, {shown(unusual)}%, and long requests, {shown(long)} for {shown(short)}%"
    claims[claim] = (unusual > usual).all() and (long > short).all()
    flags, faults, right = (
        {arm: mixed(log, arm, name) for arm in MIXES} for name in ("flag", "fault", "content")
    )
    found = flags["mined"]
    claim = f"RL on mined prompts halves the flags of the audit: {shown(found[:, 0])} to {shown(found[:, -1])}%"
    claims[claim] = (found[:, -1] < found[:, 0] / 2).all()
    found = faults["mined"]
    claim = f"and the faults that it was trained on: {shown(found[:, 0])} to {shown(found[:, -1])}%"
    claims[claim] = (found[:, -1] < found[:, 0] / 2).all()
    below = faults["mined"] <= faults["mixed in"][:, -1:]
    steps = len(below[0]) - 1
    used = np.where(below.any(1), below.argmax(1), np.inf) / steps
    claim = f"mined prompts need half of the samples for the faults that mixing in ends with: {shown(used)}"
    claims[claim] = (used <= 0.5).all()
    gap = faults["not mined"][:, -1] - faults["mined"][:, -1]
    claim = f"as many prompts of the same kinds, not mined, leave more faults: {shown(gap)} points"
    claims[claim] = (gap > 0).all()
    gap = flags["mixed in"][:, -1] - flags["mined"][:, -1]
    claims[f"mixed in, as many samples leave more flags: {shown(gap)} points"] = (gap > 0).all()
    change = right["mined"][:, -1] - right["mined"][:, 0]
    claims[f"content gains: {shown(change)} points"] = (change > 0).all()
    for kind in KINDS:
        if kind not in PROVOKING:
            kept = [100 * run["mixes"][0]["kept"][kind]["content"] for run in log["runs"]]
            lost = wild(log, kind, "content")[:, at] - kept
            claims[f"{kind} lose at most 3 points: {shown(lost)}"] = (lost <= 3).all()
    return {claim: bool(holds) for claim, holds in claims.items()}


def main(argv=None):
    """Run the experiment, or only redraw its figure, and print what it shows."""
    lesson.Lesson(
        "17_general_pathology",
        experiment,
        draw,
        verdicts,
        [weighted, judged],
        SIZES,
        SMOKE,
        MODEL,
    ).main(argv)


if __name__ == "__main__":
    main()
