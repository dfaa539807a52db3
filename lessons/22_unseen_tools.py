# %% [markdown]
# # 22 Unseen tools: does RL on search and a shop help with tools that were never trained?
#
# GLM-4.5 reinforces agents on search and on repositories alone, and the paper finds that they get better with other tools too
# (3.3). To ask this of a small model, it must be able to call a tool that it has never met, so it must have read the tool's name from
# the list of the prompt. A model that always met the same tools has no reason to read the list (lesson 14, lessons/LOG.md).
#
# **Your prediction.** Write down first: (1) Demonstrations show another world in every conversation: names of tools, arguments, what
# users say, the policy. What share of its calls is valid in an airline that it never saw? (2) The same, if all demonstrations were
# of search and the shop. (3) After RL on search and the shop alone: better or worse in the airline? (4) After as
# many tokens of new demonstrations of search and the shop, in place of RL?
#
# **Equation** (paper 3.3.2; `minglm/rl/grpo.py`)
#
#     A_i = r_i - mean_j r_j        gain = mean over test problems of (right after - right before)

# %%
import copy
import dataclasses
import random
import string

import numpy as np
from tqdm import tqdm

from minglm import lesson
from minglm.common.statistics import paired_difference
from minglm.config import RLConfig, Split
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant, user
from minglm.envs.search import SHORT, Search
from minglm.envs.worlds.short import AIRLINE, Listed, ListedWorld, drawn, line
from minglm.model.glm import GLM
from minglm.report import drawing
from minglm.rl.grpo import advantages
from minglm.rl.loop import draw_groups
from minglm.rl.rollout import rollout
from minglm.rl.schedule import TaskSchedule

MODEL = dataclasses.replace(
    lesson.REASONER,
    max_position_embeddings=512,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    rope_theta=20.0,
)
"""0.23 M parameters. Conversations have 100 to 300 tokens, so the slowest of its rotations turns once in 90."""
LONGER = dataclasses.replace(MODEL, max_position_embeddings=2048)
"""The same, for prompts with the published list of tools."""
SIZES = {
    "copies": 320_000,
    "tokens": 240_000,
    "rate": 0.01,
    "batch": 1024,
    "steps": 48,
    "prompts": 8,
    "samples": 8,
    "rl_rate": 8e-4,
    "development": 60,
    "problems": 300,
    "full": 20,
}
SMOKE = SIZES | {
    "copies": 2_000,
    "tokens": 2_000,
    "steps": 1,
    "prompts": 2,
    "samples": 2,
    "development": 2,
    "problems": 4,
    "full": 1,
}

# %% [markdown]
# ## The lines that matter
# `main` prints from minglm itself how a world is drawn, and the advantage.
#
# ## The tools
# All tasks are in single characters, which a model of this size learns to copy (lesson 14), and begin with the list of their tools, a line
# for each: what users say, the tool's name, its arguments, and the state in which the policy allows it. `main` prints a conversation of
# each kind. What is shown, reinforced and tested:
#
# | | demonstrations | RL | test |
# |---|---|---|---|
# | worlds that are drawn, another one in each conversation | yes | no | yes, others |
# | search and the shop, always the same tools | yes | yes | yes |
# | the airline: names, letters, five tools, two of them one after the other | no | no | yes |
# | steps: the next call or reply in a library, a bank, a home | no | no | yes |
# | the airline and the steps in English, with the published list of tools | no | no | yes |


# %%
class ListedSearch(Listed, Search):
    """Questions over articles, with the list of their tools."""

    default_difficulties = (1, 2)


SEARCH = ListedSearch(wording=SHORT)
SHOP = ENVIRONMENTS["shop:short"]
WORLDS = ENVIRONMENTS["worlds:short"]
TESTED = {
    "search": SEARCH,
    "shop": SHOP,
    "drawn worlds": WORLDS,
    "airline": ENVIRONMENTS["airline:short"],
    "steps": ENVIRONMENTS["functions:short"],
}
UNSEEN = ("airline", "steps")
FULL = {
    "airline in English": ENVIRONMENTS["airline"],
    "steps in English": ENVIRONMENTS["functions"],
}
ROUNDS = [("reading", "world")] + [("reading", "world", "world", "world", "shop", "search")] * 5
"""Conversations of each round of the cold start, at most."""
LEARNED = 0.4  # of the development problems of drawn worlds, which ends the cold start
WITHOUT = ("shop", "search")
"""Those of the rounds of the control that never sees a drawn world, and of more fine-tuning."""


class Astray(ListedWorld):
    """The airline with the list of a drawn world, a control."""

    def made(self, messages, label, difficulty):
        """Return a drawn problem as a task."""
        task = super().made(messages, label, difficulty)
        others = drawn(int(task.id, 16)).tools()
        system = {"role": "system", "content": " ".join(map(line, others))}
        return dataclasses.replace(task, messages=(system, *task.messages[1:]))


# %% [markdown]
# ## The cold start
# First copies: letters in any order, one of them is named, and the answer goes on from there. That is all that is
# needed to read a list, and the model learns it sooner from copies alone. Then conversations, mixed. A reading asks for the lines of a
# list in another order.


# %%
def copied(rng):
    """Return a conversation that goes on in a row of letters from the one that is named."""
    letters = rng.sample(string.ascii_letters + string.digits, rng.randint(10, 24))
    place = rng.randrange(3, len(letters) - 3)
    system = {"role": "system", "content": "".join(letters)}
    said = "".join(letters[place:] + letters[:place])
    return [system, user(letters[place]), assistant(said, "")]


def reading(rng):
    """Return a conversation that reads the lines of a list that are asked for by their first letters."""
    lines = {text[0]: text for text in map(line, drawn(rng.randrange(2**40)).tools())}
    asked = "".join(rng.sample(list(lines), len(lines)))
    said = " ".join(lines[letter] for letter in asked)
    system = {"role": "system", "content": " ".join(lines.values())}
    return [system, user(asked), assistant(said, asked)]


def shown(tokens, seed, kinds):
    """Return conversations of these kinds, more than `tokens` tokens of them."""
    rng = random.Random(seed)
    dealt = {"world": WORLDS, "shop": SHOP, "search": SEARCH}
    conversations = []
    for index in range(tokens // 80):
        kind = kinds[index % len(kinds)]
        if kind == "reading":
            conversations.append(reading(rng))
        else:
            conversations.append(dealt[kind].demonstrate(dealt[kind].task(index, seed)))
    return conversations


def policy_of(model, sizes, seed):
    """Return a model as a policy, and its side of the episodes, whose prompts list the tools in the turn of the system alone."""
    config = RLConfig(
        environments=("search:short", "shop:short"),
        steps=sizes["steps"],
        prompts=sizes["prompts"],
        samples=sizes["samples"],
        max_new_tokens=64,
        max_turns=16,
        peak_lr=sizes["rl_rate"],
        normalize_std=False,
    )
    policy = lesson.Policy(model, config, seed)
    return policy, dataclasses.replace(policy.player(), list_tools=False)


def played(player, environment, problems, split):
    """Answer problems once each. Return [level, right, calls, valid calls] of each."""
    tasks = environment.distinct_tasks(problems, 0, split)
    rows = []
    for (trajectory,) in rollout(player, {environment.name: environment}, tasks, 1):
        parts = trajectory.score.parts
        counts = (parts["calls"], parts["valid_calls"])
        rows.append([trajectory.task.difficulty, trajectory.score.value, *counts])
    return rows


def share(rows, valid=False):
    """Return how many problems are right, or how many calls are valid, in percent."""
    _, right, calls, valid_calls = np.array(rows).T
    return 100 * (valid_calls.sum() / max(1, calls.sum()) if valid else right.mean())


def tested(model, sizes, environments, split=Split.TEST):
    """Answer held-out problems of each environment. Return {name: see `played`}."""
    problems = sizes["development" if split == Split.DEVELOPMENT else "problems"]
    _, player = policy_of(model, sizes, 0)
    return {name: played(player, env, problems, split) for name, env in environments.items()}


def tested_in_english(model, sizes):
    """Answer the tasks of the full worlds, with the published list of their tools. Return {name: see `played`}."""
    longer = GLM(LONGER, 0)
    longer.load_state_dict(model.state_dict())
    policy, _ = policy_of(longer.eval(), sizes, 0)
    return {
        name: played(policy.player(), environment, sizes["full"], Split.TEST)
        for name, environment in FULL.items()
    }


def everywhere(model, sizes):
    """Answer the test problems of all environments."""
    return tested(model, sizes, TESTED) | tested_in_english(model, sizes)


# %% [markdown]
# ## Experiment: RL on search and the shop, or more demonstrations of them
# RL deals search and the shop in turn. More fine-tuning shows as many tokens of new conversations of the same two as RL learned from,
# tool results and prompts included. Two controls: the airline with the list of another world, in which a
# model that reads must call what does not exist; and a cold start of as many tokens without any drawn world.


# %%
def learn_to_copy(sizes, seed):
    """Return a model that was trained on copies."""
    model = GLM(MODEL, seed)
    rng = random.Random(seed)
    copies = [copied(rng) for _ in range(sizes["copies"] // 50)]
    lesson.imitate(model, copies, sizes["copies"], sizes["rate"], seed, batch=sizes["batch"] // 2)
    return model


def cold_start(model, sizes, seed, rounds, learned=LEARNED):
    """Train a model on conversations. Return its development tests after every round.

    rounds: kinds of conversations of each round. learned: share of drawn worlds that makes a round the last one.
    """
    tests = []
    for number, kinds in enumerate(rounds):
        conversations = shown(sizes["tokens"], seed * 100 + number, kinds)
        tune(model, conversations, sizes["tokens"], sizes, seed, sizes["rate"])
        tests.append(tested(model, sizes, TESTED, Split.DEVELOPMENT))
        if share(tests[-1]["drawn worlds"]) >= 100 * learned:
            break
    return tests


def tune(model, conversations, tokens, sizes, seed, rate):
    """Fine-tune on conversations at a rate."""
    lesson.imitate(model, conversations, tokens, rate, seed, batch=sizes["batch"])


def reinforce(start, sizes, seed):
    """Reinforce on search and the shop. Return (the model, the reward of every step, how many tokens it learned from)."""
    policy, player = policy_of(start, sizes, seed)
    environments = {environment.name: environment for environment in (SEARCH, SHOP)}
    schedule = TaskSchedule(environments, tuple(environments), sizes["prompts"], seed)
    rewards = []
    tokens = 0
    for step in range(sizes["steps"]):
        groups = draw_groups(policy.trainer, player, schedule, step).groups
        trajectories = [t for group in groups for t in group]
        of_each = [
            [t.score.value for t in trajectories if t.task.environment == name]
            for name in environments
        ]
        rewards.append([float(np.mean(values)) for values in of_each])
        tokens += sum(len(segment.tokens) for t in trajectories for segment in t.segments)
        policy.trainer.learn(groups, step)
        policy.trainer.state.step += 1
        policy.generator.update_weights(policy.trainer.model.state_dict(), step + 1)
    return policy.trainer.model, rewards, tokens


def run(seed, sizes):
    """Make all runs of one seed."""
    model = learn_to_copy(sizes, seed)
    same = copy.deepcopy(model)
    learned = cold_start(model, sizes, seed, ROUNDS)
    arms = {"cold start": everywhere(model, sizes)}
    astray = {"airline": Astray(AIRLINE, "airline:short")}
    controls = {"another list": tested(model, sizes, astray)}
    reinforced, rewards, tokens = reinforce(model, sizes, seed)
    arms["RL"] = everywhere(reinforced, sizes)
    conversations = shown(tokens, seed * 100 + 50, WITHOUT)
    for arm, rate in (("as much fine-tuning", "rate"), ("the same, at RL's rate", "rl_rate")):
        tuned = copy.deepcopy(model)
        tune(tuned, conversations, tokens, sizes, seed, sizes[rate])
        arms[arm] = everywhere(tuned, sizes)
    cold_start(same, sizes, seed, [WITHOUT] * len(learned), learned=2.0)
    controls["without drawn worlds"] = tested(same, sizes, TESTED)
    return {
        "seed": seed,
        "learned": learned,
        "rewards": rewards,
        "tokens": tokens,
        "arms": arms,
        "controls": controls,
    }


def experiment(sizes, seeds):
    """Make all runs."""
    return {"runs": [run(seed, sizes) for seed in tqdm(range(seeds), desc="seeds", disable=None)]}


# %%
ARMS = {
    "cold start": drawing.INK,
    "RL": "#1f5fa8",
    "as much fine-tuning": "#c2571a",
    "the same, at RL's rate": "#dba26f",
}


def shares(log, arm, name, valid=False):
    """Return `share` of one arm in one environment, one number a seed."""
    return [share(run["arms"][arm][name], valid) for run in log["runs"]]


def gains(log, arm, name):
    """Return what an arm adds to the cold start in one environment, in points, one `Difference` a seed."""
    found = []
    for run in log["runs"]:
        before, after = (run["arms"][one][name] for one in ("cold start", arm))
        pair = [[100 * row[1] for row in rows] for rows in (before, after)]
        found.append(paired_difference(*pair))
    return found


def draw_groups_of_bars(axis, log, names, valid):
    """Draw a bar for each arm in each environment at the mean of the seeds, with a tick for each seed."""
    width = 0.2
    for place, (arm, shade) in enumerate(ARMS.items()):
        for position, name in enumerate(names):
            values = shares(log, arm, name, valid)
            x = position + (place - 1.5) * width
            label = arm if position == 0 else None
            axis.bar(x, np.mean(values), width, color=shade, alpha=0.7, label=label)
            axis.plot([x] * len(values), values, "_", color=drawing.INK, markersize=8)
    axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)


def draw(log):
    """Draw the figure from the log alone."""
    figure, ((right, valid), (gain, curve)) = drawing.canvas(2, 2, (12, 7.5))
    draw_groups_of_bars(right, log, list(TESTED), valid=False)
    draw_groups_of_bars(valid, log, list(TESTED), valid=True)
    right.legend(frameon=False, fontsize=7)
    for place, arm in enumerate(list(ARMS)[1:]):
        for position, name in enumerate(TESTED):
            for number, found in enumerate(gains(log, arm, name)):
                x = position + (place - 1) * 0.28 + (number - 1) * 0.07
                label = arm if position + number == 0 else None
                gain.plot([x, x], [found.low, found.high], color=ARMS[arm], linewidth=1.4)
                gain.plot(x, found.mean, "o", color=ARMS[arm], markersize=3.5, label=label)
    gain.axhline(0, color=drawing.PALE, linewidth=0.8)
    gain.set_xticks(range(len(TESTED)), [name.replace(" ", "\n") for name in TESTED], fontsize=8)
    gain.legend(frameon=False, fontsize=7)
    for number, name in enumerate(("search", "shop")):
        for run in log["runs"]:
            rewards = 100 * np.array(run["rewards"])[:, number]
            curve.plot(
                np.arange(len(rewards)) + 1,
                drawing.running_mean(rewards),
                color=("#1f5fa8", "#55958c")[number],
                linewidth=1.3,
                label=name if run is log["runs"][0] else None,
            )
    curve.legend(frameon=False, fontsize=7)
    heading = f"Right answers ({len(log['runs'])} seeds; trained by RL: search, shop)"
    lesson.panel(right, heading, "", "right (%)", ylim=(0, 104))
    lesson.panel(valid, "Calls that the list allows", "", "valid calls (%)", ylim=(0, 104))
    lesson.panel(gain, "Gain over the cold start, 95% intervals", "", "points")
    lesson.panel(curve, "Reward in RL", "step", "right (%)", ylim=(0, 104))
    return figure


# %% [markdown]
# ## What would prove us wrong
# `verdicts` reads the log, and each claim can come out False.
#
# Measured (706 CPU-seconds, three seeds, 300 test problems of each kind).
#
# **A small model can call tools that it never saw.** After 0.8 to 1.8 million tokens 69 to 76% of its calls in the airline are valid, 24 to
# 35% of the tasks right, steps 29 to 46%. It reads: with the list of another world, or without drawn worlds in the cold
# start, no call is valid. In English nothing is right: 0 of 20.
#
# **RL on search and the shop adds 2 to 12 and 6 to 23 points to these two, and helps in the airline in two seeds of three**: -6.3 (-10.7 to
# -2.3), +8.3 (3.7 to 13.3), +7.0 (3.0 to 11.3); in the steps -3.7 (-8.0 to 0.7), +2.7 (-1.3 to 6.7), +4.7 (0.7 to 8.7).
#
# **It is not RL's own.** As much fine-tuning on the same two tasks, at the rate of RL, gains +2.0 (-3.7 to 7.7), +9.0 (3.3 to 14.7) and +9.0 (3.7
# to 14.3) in the airline, +2.3, +16.3 and +7.7 in the steps, and makes 94 to 99% of search, where RL makes 57 to 86%. At the rate of the
# cold start it unlearns reading: 0% of the airline, no call valid. What spares the unseen tools is the small step, not the reward.
#
# ## At full scale
# `functions`, `airline` and worlds in files (`world:FILE`) ask the same of a large model, with the published list of tools in every
# prompt; `configs/mini.py` reinforces them. Worlds that are drawn are what synthetic tools are in the paper's data (3.1).
#
# ## Exercise
# Add drawn worlds to the tasks of RL. Check: the gain in the airline, which still nobody trains on.


# %%
def verdicts(log):
    """Return {claim: whether the log supports it}."""

    def listed(values):
        return np.round(values, 1).tolist()

    claims = {}
    for name in UNSEEN:
        found = shares(log, "cold start", name, valid=True)
        claims[f"valid calls in {name}, never seen, above 10%: {listed(found)}"] = min(found) > 10
    for name in TESTED:
        found = gains(log, "RL", name)
        kind = (
            "never trained on"
            if name in UNSEEN
            else "reinforced"
            if name in ("search", "shop")
            else "shown"
        )
        claim = (
            f"RL on search and the shop adds in {name} ({kind}): {listed(found)} (mean, low, high)"
        )
        claims[claim] = all(difference.low > 0 for difference in found)
    for arm in list(ARMS)[2:]:
        for name in UNSEEN:
            found = gains(log, arm, name)
            claim = f"{arm} costs in {name}: {listed(found)} (mean, low, high)"
            claims[claim] = all(difference.high < 0 for difference in found)
        for name in ("search", "shop"):
            ahead = np.subtract(shares(log, arm, name), shares(log, "RL", name))
            claims[f"{arm} ends above RL in {name}: {listed(ahead)}"] = ahead.min() > 0
    for name, control, test in (
        ("the list of another world", "another list", "airline"),
        ("no drawn world was shown", "without drawn worlds", "airline"),
    ):
        rows = [run["controls"][control][test] for run in log["runs"]]
        right = [share(row) for row in rows]
        valid = [share(row, valid=True) for row in rows]
        claim = f"airline, {name}: below 5% right, {listed(right)}, valid calls {listed(valid)}"
        claims[claim] = max(right) < 5
    for name in FULL:
        found = shares(log, "RL", name)
        claims[f"right of {name}, after RL: above 0, {listed(found)}"] = min(found) > 0
    return {claim: bool(holds) for claim, holds in claims.items()}


def main(argv=None):
    """Run the experiment, or only redraw its figure, and print what it shows."""
    for name, environment in TESTED.items():
        print(name)
        for message in environment.demonstrate(environment.task(0, 0, difficulties=(1,))):
            calls = [f"{c['name']}({c['arguments']})" for c in message.get("tool_calls", ())]
            thought = message.get("reasoning_content", "")
            print(f"{message['role']:>10}  {thought:20} {message['content']} {' '.join(calls)}")
    lines = [drawn, advantages]
    lesson.Lesson("22_unseen_tools", experiment, draw, verdicts, lines, SIZES, SMOKE, MODEL).main(
        argv
    )


if __name__ == "__main__":
    main()
