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
# critic and reward model? (3) RL on 79 kinds of constraints: does it help with the 20 others? (4) Sixteen prompts a step, of
# which one or twelve provoke faults: how many more samples does the first need, for as few faults?
#
# **Equation** (paper 3.4; `minglm/rewards/hybrid.py`, `minglm/rewards/shaping.py`, `minglm/rewards/audit.py`)
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
from minglm.config import RewardConfig, RLConfig, Split
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import user
from minglm.envs.constraints.environment import Constraints, UnseenConstraints
from minglm.envs.pathology import CATALOGUE, PathologyPrompts, corrupt
from minglm.model.glm import GLM
from minglm.recipe.preferences import LIVELY
from minglm.report import drawing
from minglm.rewards import audit, reward_model
from minglm.rewards.hybrid import PARTS, Grader, weighted
from minglm.rewards.judge import Item
from minglm.rewards.reward_model import Pair, RewardModel, judged_tokens
from minglm.rewards.rubric import FORM
from minglm.rl.grading import grade
from minglm.rl.loop import draw_groups
from minglm.rl.schedule import TaskSchedule

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
MIXES = {  # arm: prompts of a step, by place: P provokes faults, C is a request with constraints
    "targeted": "PPPC",
    "mixed in": "P" + 15 * "C",
}
MIX_SHADES = {"targeted": "#1f5fa8", "mixed in": "#c2571a"}
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
    "fault_steps": 15,
    "fault_prompts": 16,
    "fault_samples": 4,
    "fault_every": 3,
    "answers": 3,
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
}

# %% [markdown]
# ## The lines that matter
# `main` prints them from minglm itself: the composition of the parts, and the audit.
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
# ## Experiment 2: pathologies
# First the incidence in a model that was shown clean answers only. It has hardly any, so the habit is planted, and openly: the
# model learns replies to provoking prompts half of which are spoilt (`envs.pathology.corrupt`). Then two stages of RL with a
# penalty of 1 for a fault, on as many samples: one with three provoking prompts in four, one with one in sixteen.
#
# RL is trained on prompts of difficulty 1 and 2, by the detectors of `rewards.pathology`. It is judged on prompts of difficulty
# 3, which mix two languages and which fine-tuning has shown, RL never, by the audit (compression, a model of characters, a
# grammar of sentences). And an answer must still be right: the oracle's fact in the language that was asked for.


# %%
THINGS = re.compile(r"\b(iron|gold|oxygen|neon|france|japan|cat|dog)\b", re.IGNORECASE)
"""What the prompts are about: few things, so that a small model can know them."""


class Few(PathologyPrompts):
    """The prompts of `PathologyPrompts` about a few things, of some difficulties."""

    def __init__(self, difficulties):
        self.default_difficulties = tuple(difficulties)
        self.prompts = {}
        for difficulty, entries in CATALOGUE.items():
            self.prompts[difficulty] = [
                prompt for prompt, entry in entries.items() if THINGS.search(entry.replies["en"])
            ]

    def draw(self, rng, difficulty):
        """Return one random prompt as (messages, language of a good reply)."""
        prompt = rng.choice(self.prompts[difficulty])
        return [user(prompt)], CATALOGUE[difficulty][prompt].language


PROVOKING = Few((1, 2))
OTHERS = Few((3,))
SHOWN = Few((1, 2, 3))


def habit(start, words, spoilt, sizes, seed):
    """Return the model after fine-tuning on replies to provoking prompts, and on some requests.

    spoilt: share of the replies that have a fault.
    """
    rng = random.Random(seed)
    conversations = []
    for index, task in enumerate(SHOWN.tasks(1200, seed)):
        conversation = SHOWN.demonstrate(task)
        if rng.random() < spoilt:
            conversation = corrupt(task, conversation, rng)
        conversations.append(conversation)
        if index % 3 == 0:
            conversations.append(TRAINED.demonstrate(TRAINED.task(index, seed + 1)))
    model = copy.deepcopy(start)
    tokens = sizes["fault_tokens"]
    lesson.imitate(model, conversations, tokens, sizes["fault_rate"], seed, words)
    return model


def characters(seed):
    """Return a model of the characters of clean replies, calibrated on others."""
    texts = [SHOWN.demonstrate(task)[-1]["content"] for task in SHOWN.tasks(1500, seed + 7)]
    return audit.CharacterModel(texts[:1000], texts[1000:])


def examine(policy, model, sizes):
    """Return shares of test answers: with each flag of the audit, any, the training's detectors, and the right content."""
    trajectories = policy.evaluate(
        OTHERS, sizes["problems"], sizes["answers"], Split.TRAIN
    ).trajectories
    flags = []
    for t in trajectories:
        content = t.messages[-1]["content"]
        found = audit.audit(content, model)
        replies = CATALOGUE[3][t.task.messages[-1]["content"]].replies
        found["any"] = any(found.values())
        found["training"] = any(t.faults().values())
        found["right"] = replies[t.task.label] in content
        found["right, no flag"] = found["right"] and not found["any"]
        flags.append(found)
    found = {name: float(np.mean([row[name] for row in flags])) for name in flags[0]}
    requests = policy.score(TRAINED, sizes["problems"])
    return {**found, "requests": requests["avg"]}


def cure(start, arm, model, words, sizes, seed):
    """Reinforce on one mix of prompts, with the penalty. Return what was measured on the way, over samples used."""
    sizes = sizes | {"prompts": sizes["fault_prompts"], "samples": sizes["fault_samples"]}
    policy = lesson.Policy(start, settings(sizes, fault_penalty=1.0), seed, words)
    environments = {"provocation": PROVOKING, "constraints": TRAINED}
    names = tuple({"P": "provocation", "C": "constraints"}[place] for place in MIXES[arm])
    schedule = TaskSchedule(environments, names, sizes["prompts"], seed)
    points = [examine(policy, model, sizes)]
    for step in range(sizes["fault_steps"]):
        groups = draw_groups(policy.trainer, policy.player(), schedule, step).groups
        policy.trainer.learn(groups, step)
        policy.trainer.state.step += 1
        policy.generator.update_weights(policy.trainer.model.state_dict(), step + 1)
        if (step + 1) % sizes["fault_every"] == 0:
            points.append(examine(policy, model, sizes))
    return {"arm": arm, "points": points}


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
    model = characters(seed)
    clean = lesson.Policy(habit(start, words, 0.0, sizes, seed), settings(sizes), seed, words)
    faulty = habit(start, words, 0.5, sizes, seed)
    return {
        "unplanted": examine(clean, model, sizes),
        "mixes": [cure(faulty, arm, model, words, sizes, seed) for arm in MIXES],
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


def faults(log, arm, name):
    """Return a measure of one mix along the steps, in percent: (seeds, points)."""
    found = [r["points"] for run in log["runs"] for r in run["mixes"] if r["arm"] == arm]
    return 100 * np.array([[point[name] for point in points] for points in found])


def draw(log):
    """Draw the figure from the log alone."""
    sizes = log["sizes"]
    figure, (first, second, third) = drawing.canvas(3, 2, (10.5, 10))
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
    samples = sizes["fault_prompts"] * sizes["fault_samples"] * sizes["fault_every"]
    axis, content = third
    for panel, name, heading in (
        (axis, "any", "Flagged by the audit (other prompts)"),
        (content, "right, no flag", "Right, and without a flag"),
    ):
        panel.set_ylim(0, 100)
        values = {arm: faults(log, arm, name) for arm in MIXES}
        x = samples * np.arange(len(next(iter(values.values()))[0]))
        lesson.arms(panel, x, values, MIX_SHADES)
        lesson.panel(panel, heading, "samples", "answers (%)")
    clean = 100 * np.mean([run["unplanted"]["any"] for run in log["runs"]])
    axis.axhline(clean, color=drawing.INK, linewidth=0.8, linestyle=":")
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
# **Shown clean answers, the model makes hardly a fault** (1, 1 and 2% flagged, 99, 98 and 95% right), so the habit had to be
# planted. **Aimed at, faults fall faster**, in every seed: with 960 samples the flags of the audit, on prompts that RL never
# saw, fall from 48, 43 and 59% to 21, 14 and 18 where three prompts in four provoke, and to 34, 30 and 42 where one in sixteen
# does. Answers that are right and without a flag rise from 47, 52 and 35% to 68, 72 and 72 and to 58, 63 and 50; what is said
# is right about as often or less (88, 83 and 87% before, 83, 80 and 85 and 82, 84 and 81 after). Requests change by -1, -2 and +1
# points of 14, 10 and 11. The detectors of training would have said 13, 12 and 12% at the end, where the audit says 21, 14
# and 18: the judge must not be the teacher.
#
# Tried before: 24 things in the place of eight, and half the rate, left a model that knew none of the answers (6% right).
#
# ## At full scale
# `posttraining.chat.rl.reward` and `general_rl.reward` name the parts and their weights; `judge = model` asks a model in place of
# a program. Prompts that provoke faults are collected from a model's own failures; here they are templates.
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
    clean = np.array([100 * run["unplanted"]["any"] for run in log["runs"]])
    claims[f"without planted faults less than 5% are flagged: {shown(clean)}%"] = (clean < 5).all()
    targeted, mixed = (faults(log, arm, "any") for arm in MIXES)
    claim = f"targeted RL halves the flags: {shown(targeted[:, 0])} to {shown(targeted[:, -1])}%"
    claims[claim] = (targeted[:, -1] < targeted[:, 0] / 2).all()
    gap = mixed[:, -1] - targeted[:, -1]
    claims[f"mixed in, as many samples leave more: {shown(gap)} points"] = (gap > 0).all()
    right = [faults(log, arm, "right, no flag") for arm in MIXES]
    change = right[0][:, -1] - right[0][:, 0]
    claims[f"and the content stays: right without a flag {shown(change)} points"] = (
        change > 0
    ).all()
    lost = faults(log, "targeted", "requests")
    change = lost[:, -1] - lost[:, 0]
    claims[f"targeted RL costs requests at most 3 points: {shown(change)}"] = (change > -3).all()
    return {claim: bool(holds) for claim, holds in claims.items()}


def main(argv=None):
    """Run the experiment, or only redraw its figure, and print what it shows."""
    lesson.Lesson(
        "17_general_pathology",
        experiment,
        draw,
        verdicts,
        [weighted, audit.audit],
        SIZES,
        SMOKE,
        MODEL,
    ).main(argv)


if __name__ == "__main__":
    main()
