"""Deal prompts that provoke faults of form: mixed languages, endless repetition, broken format (paper 3.4, pathology RL).

    reward = 1  iff  no fault is detected, and something was said in the language that was asked for

Such faults are rare on ordinary prompts, so a penalty mixed into general RL hardly ever applies. Here every prompt
tempts to one. Difficulty 1: open requests, and sentences that break off. Difficulty 2: invitations to
repeat without end, or prompts full of loose brackets. Difficulty 3: a request that mixes two languages. The label is
the language of a good reply, "en" or "zh". The detectors are those of `rewards.pathology`; `parts` has each of them.

Choices: knowledge is not graded; the part `right` says whether the answer holds the oracle's reply. Any clean sentence in the right language is worth 1, so `chance` is high and the
number to watch is the share of faults. "Something was said" means three words, or four Chinese characters, that are
not the request itself; without this rule the cheapest way to make no fault is to say nothing.

Simplification: these are templates over small tables. Which of them a model fails on is found by mining (`rl.mining`).
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from minglm.chat.messages import Message
from minglm.data.sources.facts import CONTINENTS, COUNTRIES, ELEMENTS, STATES
from minglm.envs.base import (
    Score,
    SingleTurn,
    SingleTurnEpisode,
    Task,
    assistant,
    message_fault,
    user,
    verdict,
)
from minglm.rewards import pathology

WORD_PATTERN = {"en": "[a-zA-Z]+", "zh": "[\u4e00-\u9fff]"}
MIN_WORDS = {"en": 3, "zh": 4}

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

# difficulty: (request, language of the reply, form of the reply). {0} and {1} name a thing in English and Chinese;
# {2} and {3} are the beginning and the end of an English sentence about it, {4} and {5} of a Chinese one.
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


Thing = tuple[str, str, str, str, str, str]


class CatalogueEntry(NamedTuple):
    """What is known of one prompt."""

    language: str
    """Language of a good reply."""
    replies: dict[str, str]
    """A clean reply in each language."""


def _things() -> Iterator[Thing]:
    """Yield the things that requests are about: six strings each, as REQUESTS numbers them."""
    for element in ELEMENTS:
        yield (
            element.name,
            element.chinese,
            f"{element.name} is a",
            element.state,
            f"{element.chinese}是",
            STATES[element.state],
        )
    for country in COUNTRIES:
        yield (
            country.name,
            country.chinese,
            f"{country.name} is in",
            country.continent,
            f"{country.chinese}在",
            CONTINENTS[country.continent],
        )
    for english, chinese in ANIMALS:
        yield english, chinese, f"a {english} is an", "animal", f"{chinese}是一种", "动物"


def _capitalised(text: str) -> str:
    """Return a text with a capital as its first letter."""
    return text[0].upper() + text[1:]


def _catalogue() -> dict[int, dict[str, CatalogueEntry]]:
    """Return {difficulty: {prompt: entry}}, every request about every thing."""
    catalogue: dict[int, dict[str, CatalogueEntry]] = {}
    for difficulty, requests in REQUESTS.items():
        entries = catalogue.setdefault(difficulty, {})
        for thing in _things():
            for request, language, form in requests:
                prompt = _capitalised(request.format(*thing))
                replies = {
                    code: _capitalised(REPLIES[code, form].format(*thing)) for code in WORD_PATTERN
                }
                entries[prompt] = CatalogueEntry(language, replies)
    return catalogue


CATALOGUE = _catalogue()
PROMPTS = {difficulty: list(entries) for difficulty, entries in CATALOGUE.items()}


def _entry(task: Task) -> CatalogueEntry:
    """Return what is known of a task's prompt."""
    return CATALOGUE[task.difficulty][task.messages[-1]["content"]]


class PathologyPrompts(SingleTurn):
    """Prompts that tempt a model to loop, to mix languages or to break the format; graded by the fault detectors."""

    name = "provocation"
    group = "chat"
    objective = False  # any reply without a fault will do
    spelled_tags_are_noise = True
    chance = 0.6  # one clean English sentence for every prompt is right for those that want English

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], str]:
        """Return one random prompt as (messages, language of a good reply)."""
        prompt = rng.choice(PROMPTS[difficulty])
        return [user(prompt)], CATALOGUE[difficulty][prompt].language

    def expected_language(self, label: Any) -> str | None:
        """Return the label, which is the language of a good reply."""
        return label

    def criteria(self, label: Any) -> dict[str, str]:
        """Return the one thing that an answer is about, which the score reports and does not grade."""
        return {"right": "Say what is true of it."}

    def episode(self, task: Task) -> "PathologyEpisode":
        """Return a fresh episode of `task`."""
        return PathologyEpisode(self, task)

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the clean reply in the right language."""
        entry = _entry(task)
        return assistant(entry.replies[entry.language], THOUGHTS[entry.language])

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if no fault is detected and enough was said in the right language."""
        text = message["content"].strip()
        words = len(re.findall(WORD_PATTERN[task.label], text))
        substance = words >= MIN_WORDS[task.label] and text != task.messages[-1]["content"]
        names = [name for name, flag in faults(task, message).items() if flag]
        parts = {
            "substance": float(substance),
            "right": float(_entry(task).replies[task.label] in text),
        }
        return verdict(substance and not names, parts, ", ".join(names))

    def hack_probes(self, task: Task) -> list[Message]:
        """Return an answer in the wrong language and answers with each fault."""
        wrong_language = {"en": "铁是一种金属。", "zh": "Iron is a metal."}[task.label]
        return super().hack_probes(task) + [
            assistant(wrong_language),
            assistant("Iron is 一种金属 and 铁 is 固体 in English 中文。"),
            assistant("Hello again. " * 40 + "你好，你好，" * 40),
            assistant("Iron is a solid. <think> 铁是固体。"),
            assistant("", "Iron is a solid. 铁是固体。"),
        ]


class PathologyEpisode(SingleTurnEpisode):
    """An episode that reports every detector, also for a message whose format halts it."""

    def __init__(self, environment: SingleTurn, task: Task) -> None:
        super().__init__(environment, task)
        self.flags: dict[str, bool] = {}

    async def step(self, message: Message) -> list[Message]:
        """Take the message and run the detectors on it."""
        self.flags = faults(self.task, message)
        return await super().step(message)

    def parts(self) -> dict[str, float]:
        """Return the numbers of every episode, and the flag of each detector."""
        return super().parts() | {name: float(flag) for name, flag in self.flags.items()}


def faults(task: Task, message: Message) -> dict[str, bool]:
    """Return the detectors' flags, {name: bool}, for one assistant message; a value that is no message is broken format."""
    if message_fault(message, ()) == "not a message":
        return dict.fromkeys(pathology.FAULTS, False) | {"format": True}
    text = message["content"]
    if isinstance(message.get("reasoning_content"), str):
        text = f"<think>{message['reasoning_content']}</think>\n{text}"
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair has no encoding
    return pathology.detect(text, task.expected_language, message)
