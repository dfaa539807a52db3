# %% [markdown]
# # 21 Verified data: are few problems with right keys worth more than many with wrong ones?
#
# A verifier rewards what the key says. For science GLM-4.5 keeps only questions whose answers experts have checked, few as
# they are; RL on a larger set of mixed quality ends lower (paper 3.2, Figure 7, right). A wrong key pays a wrong answer.
# Worse, wrong keys may have something in common, for example their place among the options, and a policy that has seen
# this is paid without knowing anything.
#
# **Your prediction.** Write down first: (1) Two in five keys of a set are wrong, and a wrong key is always the last option.
# What is the reward of a policy that knows everything, of one that names the last option, and of one that guesses? (2) RL
# on that set, with a new question every time, or on 64 questions with right keys, each of them shown ten times: which
# answers more held-out questions, whose options are shuffled? (3) How often does each of them name the last option?
# (4) Are the wrong keys the harm, or that they have something in common?
#
# **Equation** (paper 3.2; `minglm/envs/science.py`)
#
#     E[reward] = (1 - wrong) P(true answer) + wrong P(wrong key)
#     knows everything:  1 - wrong         names the last:  (1 - wrong) / 4 + wrong         guesses:  1 / 4

# %%
import random
from typing import Any

import numpy as np
from tqdm import tqdm

from minglm import lesson
from minglm.chat.messages import Message
from minglm.config import RLConfig, Split
from minglm.data.dialogues import examples
from minglm.envs.base import assistant, user, verdict
from minglm.envs.science import Science
from minglm.model.glm import GLM
from minglm.report import drawing
from minglm.rl.grpo import advantages

# What the cold start shows: few additions often, many rarely.
SHOWN = (2, 3, 4, 5) * 12 + (6,) * 4 + (7,) * 2 + (8, 9)
MIXED = (5, 6, 7, 8)  # of the cold start that shows half of them without reasoning
ASKED = (7, 8)
OPTIONS = 4
WRONG = 0.4
FEW = 64
ARMS = {  # arm: (colour, share of wrong keys, whether they are the last option, questions; 0: as many as are asked)
    "few, verified": ("#1f5fa8", 0.0, False, FEW),
    "many, noisy": ("#c2571a", WRONG, True, 0),
    "few, noisy": ("#dfa27c", WRONG, True, FEW),
    "many, noisy anywhere": ("#8a8a92", WRONG, False, 0),
    "many, verified": ("#9fc3e6", 0.0, False, 0),
}
SIZES = {
    "tokens": 350_000,
    "rate": 0.02,
    "mixed_tokens": 120_000,
    "mixed_rate": 0.008,
    "steps": 40,
    "prompts": 16,
    "samples": 8,
    "rl_rate": 4e-4,
    "every": 8,
    "problems": 100,
    "final_problems": 200,
    "final_samples": 4,
}
SMOKE = SIZES | {
    "tokens": 4096,
    "mixed_tokens": 2048,
    "steps": 2,
    "prompts": 2,
    "samples": 2,
    "every": 1,
    "problems": 2,
    "final_problems": 2,
    "final_samples": 2,
}

# %% [markdown]
# ## The lines that matter
# `main` prints them from minglm itself: how `Science` makes a wrong key, and the advantage, which believes every key.
#
# ## The task
# `minglm.envs.science` has both sets, for models that know facts. A model of 0.2 M parameters learns the facts, but neither
# to apply them to questions it was never asked nor to find the letter of an option (see the end). So the question is a sum
# modulo 5 here. The options are four of the five digits in any order, and the answer is one of them.
#
#     3+4+1+2= 4 0 2 1       thought: 421320       answer: 0
#
# A right key stands at any place, a wrong one is the last option, or anywhere in one arm.


# %%
class Choice(lesson.Sums):
    """Deals sums with four options, one of which is the answer; the thought is that of `Sums`.

    levels: additions of a sum. wrong: share of the questions whose key is wrong. last: whether a wrong key is the last
    option. questions: those of the training split, which then come again; 0: each is new.
    """

    name = "choice"
    difficulties = tuple(range(2, 17))  # of one addition there are too few sums for three splits

    def __init__(self, levels, wrong=0.0, last=False, questions=0):
        super().__init__(levels, told=1)
        self.chance = 1 / OPTIONS
        self.wrong = wrong
        self.last = last
        self.questions = questions

    def task(self, index, seed, split=Split.TRAIN, difficulties=None):
        """Return task number `index` of a seed's sequence."""
        if self.questions and split == Split.TRAIN:
            index %= self.questions
        return super().task(index, seed, split, difficulties)

    def draw(self, rng, difficulty) -> tuple[list[Message], Any]:
        """Return one random question as (messages, {"key", "true", "last": options})."""
        messages, total = super().draw(rng, difficulty)
        others = sorted(set(map(str, range(lesson.MODULUS))) - {total})
        options = [total, *rng.sample(others, OPTIONS - 1)]
        wrong = rng.random() < self.wrong
        key = options[-1] if wrong else total
        if wrong and self.last:
            options = [*rng.sample(options[:-1], OPTIONS - 1), key]
        else:
            rng.shuffle(options)
        question = " ".join([messages[0]["content"], *options])
        return [user(question)], {"key": key, "true": total, "last": options[-1]}

    def problem(self, messages, label):
        """Return the sum without its options."""
        return [messages[0]["content"].split("=")[0]]

    def oracle(self, task, conversation, rng):
        """Return the key, with every term and the sum after it as reasoning."""
        question = task.messages[-1]["content"].split("=")[0]
        terms = list(map(int, question.split("+")))
        sums = np.cumsum(terms) % lesson.MODULUS
        thought = "".join(f"{t}{s}" for t, s in zip(terms[1:], sums[1:], strict=True))
        return assistant(task.label["key"], thought)

    def judge(self, task, message):
        """Return 1 if the stripped answer is the key."""
        return verdict(message["content"].strip() == task.label["key"])


# %% [markdown]
# ## The start
# A first cold start teaches to reason, on sums without options. A second one shows questions, half of them with reasoning, and
# half with a thought that only names the last option, where that is right. Nothing in it is wrong, and **the shortcut is
# planted by it**: the policy has two manners, one that reasons and one that looks at a place.


# %%
def mixed_start(model, sizes, seed):
    """Fine-tune on answers of both manners, half and half, all of them right."""
    environment = Choice(MIXED)
    rng = random.Random(seed)
    conversations = []
    count = 0
    index = 0
    while count < sizes["mixed_tokens"]:
        task = environment.task(index, seed)
        index += 1
        conversation = environment.demonstrate(task)
        if rng.random() < 0.5:
            while task.label["last"] != task.label["true"]:
                task = environment.task(index, seed)
                index += 1
            answer = assistant(task.label["last"], task.label["last"])
            conversation = [*environment.demonstrate(task)[:-1], answer]
        conversations.append(conversation)
        count += sum(len(e.tokens_S) for e in examples(lesson.BYTES, conversation))
    tokens, rate = sizes["mixed_tokens"], sizes["mixed_rate"]
    lesson.imitate(model, conversations, tokens, rate, seed)


# %% [markdown]
# ## Experiment
# Five times RL from the same weights, with as many steps and answers: few questions or many, with right keys, with wrong
# ones at the last place, or with wrong ones anywhere. Everything is scored on held-out questions with right keys and
# shuffled options. Controls: a guess or the last option (one in four), and what the start knows.


# %%
def settings(sizes):
    """Return the settings of the RL stage."""
    return RLConfig(
        environments=("choice",),
        steps=sizes["steps"],
        prompts=sizes["prompts"],
        samples=sizes["samples"],
        max_new_tokens=32,
        peak_lr=sizes["rl_rate"],
    )


def scored(policy, problems, samples, split):
    """Score held-out questions. Return the share of right answers with its interval, and that of last options."""
    found = policy.evaluate(Choice(ASKED), problems, samples, split)
    last = [t.task.label["last"] == t.messages[-1]["content"] for t in found.trajectories]
    score = {name: found.record[name] for name in ("avg", "low", "high")}
    return score | {"last": float(np.mean(last))}


def train(start, arm, sizes, seed):
    """Reinforce on the questions of one arm. Return its curves and its test score."""
    _, wrong, last, questions = ARMS[arm]
    policy = lesson.Policy(start, settings(sizes), seed)
    environment = Choice(ASKED, wrong, last, questions)
    curve = []
    rewards = []
    for step in range(sizes["steps"] + 1):
        if step % sizes["every"] == 0:
            curve.append(scored(policy, sizes["problems"], 1, Split.DEVELOPMENT))
        if step < sizes["steps"]:
            rewards.append(policy.step(environment).reward)
    test = scored(policy, sizes["final_problems"], sizes["final_samples"], Split.TEST)
    return {"arm": arm, "curve": curve, "rewards": rewards, "test": test}


def begin(seed, sizes):
    """Return the start of all arms of one seed."""
    start = GLM(lesson.REASONER, seed)
    lesson.cold_start(start, lesson.Sums(SHOWN, told=1), sizes["tokens"], sizes["rate"], seed)
    mixed_start(start, sizes, seed)
    return start


def run(seed, sizes):
    """Make all runs of one seed."""
    start = begin(seed, sizes)
    policy = lesson.Policy(start, settings(sizes), seed)
    before = scored(policy, sizes["final_problems"], sizes["final_samples"], Split.TEST)
    arms = [train(start, arm, sizes, seed) for arm in ARMS]
    return {"seed": seed, "start": before, "arms": arms}


def experiment(sizes, seeds):
    """Make all runs. Seed 0 chose the settings."""
    numbers = list(range(1, seeds + 1))
    runs = [run(seed, sizes) for seed in tqdm(numbers, desc="seeds", disable=None)]
    return {"seeds": numbers, "runs": runs}


# %%
def results(log, arm):
    """Return the results of one arm, one a seed."""
    return [result for run in log["runs"] for result in run["arms"] if result["arm"] == arm]


def curve(log, arm, name):
    """Return a curve on development questions in percent: (seeds, points)."""
    return np.array([[100 * point[name] for point in r["curve"]] for r in results(log, arm)])


def tested(log, arm, name):
    """Return a number of the test in percent, one a seed; of the start, where that is the arm."""
    if arm == "start":
        return np.array([100 * run["start"][name] for run in log["runs"]])
    return np.array([100 * r["test"][name] for r in results(log, arm)])


def draw(log):
    """Draw the figure from the log alone."""
    sizes = log["sizes"]
    figure, axes = drawing.canvas(2, 2, (9.5, 6.2))
    rewards, right, shortcut, tests = axes.flat
    shades = {arm: shade for arm, (shade, *_) in ARMS.items()}
    lesson.panel(rewards, "What the keys pay", "step", "reward (%)", ylim=(0, 100))
    lesson.panel(right, "Figure 7, right: held out", "step", "right (%)", ylim=(0, 100))
    lesson.panel(shortcut, "The shortcut", "step", "last option (%)", ylim=(0, 100))
    lesson.panel(tests, "After training (test)", "", "right (%)", ylim=(0, 100))
    paid = {}
    for arm in ARMS:
        paid[arm] = [
            [100 * x for x in drawing.running_mean(r["rewards"])] for r in results(log, arm)
        ]
    lesson.arms(rewards, np.arange(sizes["steps"]) + 1, paid, shades)
    x = np.arange(0, sizes["steps"] + 1, sizes["every"])
    lesson.arms(right, x, {arm: curve(log, arm, "avg") for arm in ARMS}, shades)
    lesson.arms(shortcut, x, {arm: curve(log, arm, "last") for arm in ARMS}, shades)
    arms = ("start", *ARMS)
    names = [arm.replace(" ", "\n") for arm in arms]
    values = [tested(log, arm, "avg") for arm in arms]
    lesson.bars(tests, names, values, ["#8a8a92", *shades.values()])
    tests.tick_params(axis="x", labelsize=7)
    for axis in (right, shortcut, tests):
        axis.axhline(100 / OPTIONS, color=drawing.PALE, linewidth=0.8, linestyle=":")
    return figure


# %% [markdown]
# ## What would prove us wrong
# `verdicts` reads the log, and each claim can come out False.
#
# Measured (153 CPU-seconds, three seeds, 200 test questions x 4; the start answers 48, 53 and 48%). **64 verified questions
# lead to 88, 89 and 94%, any number of noisy ones to 61, 57 and 76%**: 27, 32 and 18 points less, with intervals that do
# not meet. The noise does not make the model worse than it was, as we had expected; it takes most of the gain. **What the
# wrong keys have in common is most of the harm**: as many of them at random places cost 7, 8 and 1 points only, because
# errors without a pattern cancel. The shortcut is what the noise keeps alive: the last option is named in 46, 51 and 31% of
# the answers, and in 23% after verified questions (by chance a quarter). **More verified questions add nothing**: 91, 88
# and 95%. 64 are enough to choose between two manners that the model has already. A model that must learn facts from its
# questions would need more, and this toy does not show that.
#
# Tried before: `Science` itself. With 0.24 M parameters and 1.5 M tokens of questions and of the bare facts, the thought named
# the right option in 84% of the questions that were shown and in 28% of held-out ones, and the letter was at chance.
# Sums with lettered options, and a longest option as the shortcut, were not learned either (0.4 to 0.5 M tokens).
#
# ## Exercise
# Leave the second cold start out, so that no shortcut is planted. Does RL find it by itself? Check: the share of last
# options after 60 steps, beside a quarter.


# %%
def verdicts(log):
    """Return {claim: whether the log supports it}."""
    right = {arm: tested(log, arm, "avg") for arm in ("start", *ARMS)}
    last = {arm: tested(log, arm, "last") for arm in ("start", *ARMS)}

    def shown(values):
        return values.round(1).tolist()

    claims = {}
    gain = right["few, verified"] - right["many, noisy"]
    claim = f"few verified questions beat many noisy ones with every seed: {shown(gain)} points"
    claims[claim] = gain.min() > 0
    gain = right["few, verified"] - right["start"]
    claim = f"and improve on the start: {shown(gain)} points"
    claims[claim] = gain.min() > 0
    gain = right["many, noisy"] - right["start"]
    claim = f"noisy ones make the model worse than it was: {shown(gain)} points"
    claims[claim] = gain.max() < 0
    gain = last["many, noisy"] - last["start"]
    claim = f"because they teach the shortcut: {shown(gain)} points more last options"
    claims[claim] = gain.min() > 0
    gain = right["many, noisy anywhere"] - right["many, noisy"]
    claim = f"wrong keys with nothing in common harm less: {shown(gain)} points"
    claims[claim] = gain.min() > 0
    gain = right["few, verified"] - right["many, noisy anywhere"]
    claim = f"and few verified questions beat these too: {shown(gain)} points"
    claims[claim] = gain.min() > 0
    gain = right["many, verified"] - right["few, verified"]
    claim = f"many verified ones would be better still: {shown(gain)} points"
    claims[claim] = gain.min() > 0
    return {claim: bool(holds) for claim, holds in claims.items()}


def main(argv=None):
    """Run the experiment, or only redraw its figure, and print what it shows."""
    shown = [Science.draw, advantages]
    lesson.Lesson(
        "21_verified", experiment, draw, verdicts, shown, SIZES, SMOKE, lesson.REASONER, seeds=1
    ).main(argv)


if __name__ == "__main__":
    main()
