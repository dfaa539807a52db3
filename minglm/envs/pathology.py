"""Requests that provoke faults of form: mixed languages, endless repetition, broken format (paper 3.4, pathology RL).

    reward = 1  iff  no fault is detected, and something was said in the language that was asked for

Such faults are rare on ordinary prompts, so a penalty mixed into general RL hardly ever fires. Here every prompt is
chosen because it leads there. Tier 1: open requests, and sentences that break off. Tier 2: invitations to repeat
without end, or prompts full of loose brackets. Tier 3: a request that mixes two languages. The label is the language
of a good reply, "en" or "zh". The detectors are those of `rl.pathology`; `parts` has each of them.

Choices: knowledge is not graded, any clean sentence in the right language is worth 1, so `chance` is high and the
number to watch is the share of faults. "Something was said" means three words, or four Chinese characters, that are
not the request itself; without this rule the cheapest way to make no fault is to say nothing.

Simplification: the paper collects prompts on which its own model failed; these are templates over small tables. A
model trained for minutes has no bad habits of its own yet, so `spoil` puts one into an answer: fine-tuned on some of
those, a model starts pathology RL with faults that are likely, and not merely possible.
"""

import math
import re

from minglm.data.sources.facts import CONTINENTS, COUNTRIES, ELEMENTS, STATES
from minglm.envs.base import SingleTurn, SingleTurnEpisode, assistant, message_fault, user, verdict
from minglm.rewards import pathology

OWN_WORDS = {"en": "[a-zA-Z]+", "zh": "[\u4e00-\u9fff]"}
LEAST_SAID = {"en": 3, "zh": 4}
LOOP_CHARACTERS = 60  # of a spoilt answer that repeats itself; the detector wants more than 40

ANIMALS = (
    ("cat", "猫"),
    ("dog", "狗"),
    ("horse", "马"),
    ("cow", "牛"),
    ("sheep", "羊"),
    ("bird", "鸟"),
    ("rabbit", "兔子"),
    ("tiger", "老虎"),
    ("monkey", "猴子"),
    ("elephant", "大象"),
)


THOUGHTS = {"en": "answer in English", "zh": "用中文回答"}

# tier: (request, language of the reply, kind of reply). {0} and {1} name a thing in English and Chinese; {2} and {3}
# are the beginning and the end of an English sentence about it, {4} and {5} of a Chinese one.
REQUESTS = {
    1: (
        ("Tell me about {0}.", "en", "fact"),
        ("What is {0}?", "en", "fact"),
        ("{2}", "en", "fact"),
        ("介绍一下{1}。", "zh", "fact"),
        ("{1}是什么？", "zh", "fact"),
        ("{4}", "zh", "fact"),
    ),
    2: (
        ("Say {0} again and again.", "en", "once"),
        ("Write {0} forever. Do not stop.", "en", "once"),
        ("{0} {0} {0} {0} {0}", "en", "fact"),
        ("<<[[{{{0} ((", "en", "fact"),
        ("一直说{1}，不要停。", "zh", "once"),
        ("把{1}写一百遍。", "zh", "once"),
        ("{1}{1}{1}{1}{1}", "zh", "fact"),
        ("《《【【{1}（（", "zh", "fact"),
    ),
    3: (
        ("Tell me about {1} in English.", "en", "fact"),
        ("{1}? Answer in English.", "en", "fact"),
        ("请用英文介绍{1}。", "en", "fact"),
        ("用中文介绍一下 {0}。", "zh", "fact"),
        ("{0} 是什么？", "zh", "fact"),
        ("Say in Chinese what {0} is.", "zh", "fact"),
    ),
}
REPLIES = {
    ("en", "fact"): "{2} {3}.",
    ("zh", "fact"): "{4}{5}。",
    ("en", "once"): "{0}. Once is enough.",
    ("zh", "once"): "{1}。说一遍就够了。",
}


def _things():
    """What the requests are about: six strings each, as REQUESTS numbers them."""
    for e in ELEMENTS:
        yield e.name, e.chinese, f"{e.name} is a", e.state, f"{e.chinese}是", STATES[e.state]
    for c in COUNTRIES:
        yield (
            c.name,
            c.chinese,
            f"{c.name} is in",
            c.continent,
            f"{c.chinese}在",
            CONTINENTS[c.continent],
        )
    for english, chinese in ANIMALS:
        yield english, chinese, f"a {english} is an", "animal", f"{chinese}是一种", "动物"


def _catalogue():
    """{tier: {prompt: (language, {language: reply})}}, every request about every thing."""
    pages = {}
    for tier, requests in REQUESTS.items():
        for thing in _things():
            for request, language, kind in requests:
                prompt = request.format(*thing)
                replies = {code: REPLIES[code, kind].format(*thing) for code in OWN_WORDS}
                replies = {code: reply[0].upper() + reply[1:] for code, reply in replies.items()}
                pages.setdefault(tier, {})[prompt[0].upper() + prompt[1:]] = (language, replies)
    return pages


CATALOGUE = _catalogue()
PROMPTS = {tier: list(page) for tier, page in CATALOGUE.items()}


class Provocation(SingleTurn):
    """Prompts that tempt a model to loop, to mix languages or to break the format; graded by the fault detectors."""

    name = "provocation"
    group = "chat"
    chance = 0.6  # one clean English sentence for every prompt is right for those that want English

    def draw(self, rng, tier):
        prompt = rng.choice(PROMPTS[tier])
        return [user(prompt)], CATALOGUE[tier][prompt][0]

    def episode(self, task):
        return ProvocationEpisode(self, task)

    def oracle(self, task, conversation, rng):
        language, replies = CATALOGUE[task.tier][task.messages[-1]["content"]]
        return assistant(replies[language], THOUGHTS[language])

    def judge(self, task, message):
        text, prompt = message["content"].strip(), task.messages[-1]["content"]
        said = len(re.findall(OWN_WORDS[task.label], text))
        substance = said >= LEAST_SAID[task.label] and text != prompt
        found = [name for name, flag in faults(task, message).items() if flag]
        return verdict(substance and not found, {"substance": float(substance)}, ", ".join(found))

    def hack_probes(self, task):
        return super().hack_probes(task) + [
            assistant({"en": "铁是一种金属。", "zh": "Iron is a metal."}[task.label]),
            assistant("Iron is 一种金属 and 铁 is 固体 in English 中文。"),
            assistant("Hello again. " * 40 + "你好，你好，" * 40),
            assistant("Iron is a solid. <think> 铁是固体。"),
            assistant("", "Iron is a solid. 铁是固体。"),
        ]


def spoil(task, conversation, rng):
    """The oracle's conversation with one fault, drawn by `rng`, in its answer: mixed, endless or with a stray tag."""
    language, replies = CATALOGUE[task.tier][task.messages[-1]["content"]]
    reply, foreign = replies[language], replies["en" if language == "zh" else "zh"]
    spoilt = rng.choice(
        [
            f"{foreign} {reply} {foreign}",
            " ".join([reply] * max(3, math.ceil(LOOP_CHARACTERS / len(reply)))),
            reply + rng.choice(["</think>", "<think>", "<tool_call>", "</arg_value>"]),
        ]
    )
    return [*conversation[:-1], conversation[-1] | {"content": spoilt}]


class ProvocationEpisode(SingleTurnEpisode):
    """Reports every detector, also for a message whose format halts the episode."""

    found = {}

    def step(self, message):
        self.found = faults(self.task, message)
        return super().step(message)

    def parts(self):
        return super().parts() | {name: float(flag) for name, flag in self.found.items()}


def faults(task, message):
    """The detectors' flags, {name: bool}, for one assistant message; garbage that is no message is broken format."""
    if message_fault(message, ()) == "not a message":
        return dict.fromkeys(pathology.FAULTS, False) | {"format": True}
    text = message["content"]
    if isinstance(message.get("reasoning_content"), str):
        text = f"<think>{message['reasoning_content']}</think>\n{text}"
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair has no encoding
    return pathology.detect(text, task.label, message)
