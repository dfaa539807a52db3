"""Give verifiable instructions in English and Chinese (paper 3.4, instruction-following RL, Figure 9).

    Write 3 numbers. Only even. With commas.        think: 1 six 2 two 3 eight     six, two, eight
    用中文写3个数。要有七。以！结尾。                      think: 1七2四3九                七 四 九！

Every request fixes the number of number words and their language; the difficulty is the number of further
constraints, 1 to 3, on meaning and form. Difficulty 4 has three too, and they may be about letters, or one
word is to be repeated. The reward is 1 when all of them hold and 0 otherwise (strict); `parts` has each
constraint by itself, so partial progress is visible in the logs.

Choices: the checks are programs, as in the paper's deterministic verification rules, and never a model.
Content is the nine number words of a language and nothing else: a model of a million weights can learn what
nine words mean, so that obeying is what is measured, and a closed list leaves no room for noise that looks
like words. There are thousands of different requests, so that following them is easier than memorising them.
The oracle thinks by numbering its words: a count that is written down need not be kept in mind. Constraints
on the letters of a word are left to difficulty 4, because a tokenizer hides letters.

Simplification: the paper has 151 kinds of constraints; here are 19, and 99 in `minglm.envs.constraints`, 17 of them
the same.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Score, SingleTurn, Task, assistant, user, verdict

Constraints = dict[str, Any]
"""{constraint: value}, the value None for constraints without one. Always has count or repeat, and language."""

WORDS = {
    "en": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "zh": list("一二三四五六七八九"),
}
VALUE = {word: number for words in WORDS.values() for number, word in enumerate(words, 1)}
LANGUAGE_NAMES = {"en": ("English", "英文"), "zh": ("Chinese", "中文")}
MARKS = {"en": ".!?", "zh": "。！？"}

# (language of the request, language of the answer); as often as they are drawn
LANGUAGES = ["en en", "en en", "en zh", "zh zh", "zh zh", "zh en"]

# constraint: (request in English, request in Chinese). The order is that of the request.
PHRASES = {
    "count": ("Write {} numbers.", "写{}个数。"),
    "repeat": ("Say {1} {0} times.", "说{0}遍{1}。"),
    "language": ("In {}.", "用{}。"),
    "even": ("Only even.", "只要双数。"),
    "odd": ("Only odd.", "只要单数。"),
    "above": ("All above {}.", "都大于{}。"),
    "below": ("All below {}.", "都小于{}。"),
    "include": ("Use {}.", "要有{}。"),
    "avoid": ("Without {}.", "不要{}。"),
    "up": ("Smallest first.", "从小到大。"),
    "down": ("Largest first.", "从大到小。"),
    "start": ("Start each with {}.", "每个以{}开头。"),
    "forbid": ("No letter {}.", "不用字母{}。"),
    "capitals": ("All capitals.", "全部大写。"),
    "dashes": ("As a dash list.", "用-列出。"),
    "numbered": ("As a numbered list.", "用数字列出。"),
    "commas": ("With commas.", "用逗号隔开。"),
    "brackets": ("In brackets.", "放在括号里。"),
    "end": ("End with {}", "以{}结尾。"),
}
EXCLUSIVE = (
    ("even", "odd"),
    ("up", "down"),
    ("dashes", "numbered", "commas"),
    ("dashes", "numbered", "brackets"),
)
MEANING = ("even", "odd", "above", "below", "include", "avoid", "up", "down")
LAYOUT = ("dashes", "numbered", "commas", "brackets", "end")
CONSTRAINTS = {"en": (*MEANING, "capitals", *LAYOUT), "zh": (*MEANING, *LAYOUT)}
HARD_CONSTRAINTS = {  # difficulty 4: letters of English words, or one word repeated
    ("count", "en"): (*CONSTRAINTS["en"], "start", "forbid"),
    ("count", "zh"): CONSTRAINTS["zh"],
    ("repeat", "en"): ("capitals", *LAYOUT),
    ("repeat", "zh"): LAYOUT,
}


class Instructions(SingleTurn):
    """Write some numbers under one to three constraints beside count and language; difficulty 4 is the hardest."""

    name = "instructions"
    group = "chat"
    chance = 0.05
    difficulties = (1, 2, 3, 4)
    default_difficulties = (1, 2, 3)
    shown_difficulties = (1, 2)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random request as (messages, label).

        Label: {"asked": language of the request, "constraints": {constraint: value}}.
        """
        while True:
            asked, language = rng.choice(LANGUAGES).split()
            if difficulty < 4:
                base = "count"
                pool = CONSTRAINTS[language]
            else:
                base = rng.choice(["count", "repeat"])
                pool = HARD_CONSTRAINTS[base, language]
            names = rng.sample(pool, min(difficulty, 3))
            constraints: Constraints = {base: rng.randint(2, 5)}
            if base == "repeat":
                constraints[base] = [constraints[base], rng.choice(WORDS[language])]
            constraints["language"] = language
            for name in sorted(names, key=list(PHRASES).index):
                constraints[name] = draw_value(rng, name, language)

            if base == "count" and len(candidates(constraints)) < constraints["count"]:
                continue  # not enough words satisfy the constraints
            if any(len({*names} & {*rivals}) >= 2 for rivals in EXCLUSIVE):
                continue
            said = sentences(constraints, asked).values()
            request = ("" if asked == "zh" else " ").join(said)
            return [user(request)], {"asked": asked, "constraints": constraints}

    def criteria(self, label: Any) -> dict[str, str]:
        """Return the sentence of every constraint."""
        return sentences(label["constraints"], label["asked"])

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return an answer that satisfies every constraint, with its words numbered as reasoning."""
        constraints: Constraints = task.label["constraints"]
        if "repeat" in constraints:
            times, word = constraints["repeat"]
            words = [word] * times
        else:
            words = rng.sample(candidates(constraints), constraints["count"])
            wanted = constraints.get("include", words[0])
            others = [word for word in words if word != wanted]
            words = [wanted, *others][: len(words)]
            if "up" in constraints or "down" in constraints:
                words.sort(key=VALUE.__getitem__, reverse="down" in constraints)
        return assistant(written(words, constraints), thought(words, constraints["language"]))

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if every constraint holds; `parts` has each of them, and none holds of an answer without a word."""
        text = message["content"].strip()
        words = split_words(text)
        parts = {}
        for name, value in task.label["constraints"].items():
            parts[name] = float(bool(words) and CHECKS[name](words, text, value))
        return verdict(all(parts.values()), parts)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return one fitting word repeated, all words in several forms, and an answer that is only thought."""
        constraints: Constraints = task.label["constraints"]
        all_words = WORDS[constraints["language"]]
        one_word = candidates(constraints)[:1] * constraints.get("count", 0)
        return (
            super().hack_probes(task)
            + [
                assistant(" ".join(one_word) + constraints.get("end", "")),
                assistant(" ".join(all_words)),
                assistant(" ".join(all_words).upper() + "!"),
                assistant("\n".join("- " + word for word in all_words)),
                assistant("s sk sky st str"),  # not words
                assistant("", " ".join(all_words[:3])),
            ]
        )


def draw_value(rng: random.Random, constraint: str, language: str) -> int | str | None:
    """Return a random value for a constraint; None for those without one."""
    choices: dict[str, Sequence[int | str]] = {
        "above": (2, 3, 4),
        "below": (6, 7, 8),
        "include": WORDS[language],
        "avoid": WORDS[language],
        "start": "fost",
        "forbid": "efinost",
        "end": MARKS[language],
    }
    return rng.choice(choices[constraint]) if constraint in choices else None


def candidates(constraints: Constraints) -> list[str]:
    """Return the words that each satisfy the constraints on single words; none if the word to include does not."""
    about_words = ("even", "odd", "above", "below", "avoid", "start", "forbid")
    names = [name for name in about_words if name in constraints]
    words = []
    for word in WORDS[constraints["language"]]:
        if all(CHECKS[name]([word], word, constraints[name]) for name in names):
            words.append(word)
    if "include" in constraints and constraints["include"] not in words:
        return []
    return words


def sentences(constraints: Constraints, asked: str) -> dict[str, str]:
    """Return {constraint: its sentence in the language `asked`}.

    The language of the answer is not stated when it is English, asked for in English, or shown by the word to repeat.
    """
    column = int(asked == "zh")  # of PHRASES and LANGUAGE_NAMES
    language_is_clear = "repeat" in constraints or constraints["language"] == asked == "en"
    said = {}
    for name, value in constraints.items():
        if name == "language":
            if language_is_clear:
                continue
            value = LANGUAGE_NAMES[value][column]
        values = value if isinstance(value, (list, tuple)) else (value,)
        said[name] = PHRASES[name][column].format(*values)
    return said


def thought(words: Sequence[str], language: str) -> str:
    """Return the words with their numbers: `1 six 2 two`, `1六2二`."""
    gap = " " if language == "en" else ""
    return gap.join(f"{number}{gap}{word}" for number, word in enumerate(words, 1))


def written(words: Sequence[str], constraints: Constraints) -> str:
    """Return the answer: the words in the form that the constraints ask for."""
    comma = ", " if constraints["language"] == "en" else "，"
    if "dashes" in constraints:
        text = "\n".join("- " + word for word in words)
    elif "numbered" in constraints:
        text = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    elif "commas" in constraints:
        text = comma.join(words)
    else:
        text = " ".join(words)
    if "capitals" in constraints:
        text = text.upper()
    if "brackets" in constraints:
        text = f"({text})"
    return text + constraints.get("end", "")


def inner(text: str) -> str:
    """Return an answer without its closing mark and the brackets around it."""
    text = re.sub(r"[.!?。！？]$", "", text)
    return re.sub(r"^[(（](.*)[)）]$", r"\1", text, flags=re.DOTALL)


def split_words(text: str) -> list[str]:
    """Return the words of an answer in lower case, split at spaces and commas, without marks, brackets, list marks."""
    text = re.sub(r"^(- |\d+\. )", "", inner(text), flags=re.MULTILINE)
    return [word for word in re.split(r"[\s,，、]+", text.lower()) if word]


def values(words: Sequence[str]) -> list[int]:
    """Return the numbers that the words mean; words that are not numbers give 0."""
    return [VALUE.get(word, 0) for word in words]


def is_list(words: Sequence[str], text: str, marks: Sequence[str]) -> bool:
    """Return whether an answer has one word per line, each after its mark."""
    lines = text.splitlines()
    if len(lines) != len(words):
        return False
    return all(line.startswith(mark) for line, mark in zip(lines, marks, strict=True))


CHECKS: dict[str, Callable[[list[str], str, Any], bool]] = {
    "count": lambda words, text, value: len(words) == len(set(words)) == value,
    "repeat": lambda words, text, value: words == [value[1]] * value[0],
    "language": lambda words, text, value: (
        bool(words) and all(word in WORDS[value] for word in words)
    ),
    "even": lambda words, text, value: all(number % 2 == 0 for number in values(words)),
    "odd": lambda words, text, value: all(number % 2 == 1 for number in values(words)),
    "above": lambda words, text, value: all(number > value for number in values(words)),
    "below": lambda words, text, value: all(number < value for number in values(words)),
    "include": lambda words, text, value: value in words,
    "avoid": lambda words, text, value: value not in words,
    "up": lambda words, text, value: values(words) == sorted(values(words)),
    "down": lambda words, text, value: values(words) == sorted(values(words), reverse=True),
    "start": lambda words, text, value: all(word.startswith(value) for word in words),
    "forbid": lambda words, text, value: value not in text.lower(),
    "capitals": lambda words, text, value: text == text.upper() != "",
    "dashes": lambda words, text, value: is_list(words, text, ["- "] * len(words)),
    "numbered": lambda words, text, value: is_list(
        words, text, [f"{n}. " for n in range(1, len(words) + 1)]
    ),
    "commas": lambda words, text, value: re.split(r", |，", inner(text).lower()) == words,
    "brackets": lambda words, text, value: (
        re.fullmatch(r"[(（].*[)）][.!?。！？]?", text, re.DOTALL) is not None
    ),
    "end": lambda words, text, value: text.endswith(value),
}
"""Each check takes the words in lower case, the stripped answer, and the constraint's value."""
