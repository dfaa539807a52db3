"""Verifiable instructions in English and Chinese (paper 3.4, instruction-following RL, Figure 9).

    Write 3 numbers. Only even. With commas.        think: 1 six 2 two 3 eight     six, two, eight
    用中文写3个数。要有七。以！结尾。                      think: 1七2四3九                七 四 九！

Every request fixes how many number words and in which language; the difficulty is the number of further constraints, 1 to 3,
on meaning and form. Tier 4 has three too, and they may be about letters, or one word is to be repeated. The reward is 1
when all of them hold and 0 otherwise (strict); `parts` has each constraint by itself, so partial progress is visible in
the logs.

Choices: the checks are programs, as in the paper's deterministic verification rules, and never a model. Content is the
nine number words of a language and nothing else: a model of a million weights can learn what nine words mean, so that
obeying is what is measured, and a closed list leaves no room for noise that looks like words. There are thousands of
different requests, so that following them is easier than learning them by heart. The oracle thinks by numbering its
words: a count that is written down need not be kept in mind. Constraints on the letters of a word are left to difficulty 4,
because a tokenizer hides letters.

Simplification: the paper has 151 kinds of constraints, and combines rules with a reward model and critiques; here
rules stand alone.
"""

import re

from minglm.envs.base import SingleTurn, assistant, user, verdict

WORDS = {
    "en": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "zh": list("一二三四五六七八九"),
}
VALUE = {word: number for words in WORDS.values() for number, word in enumerate(words, 1)}
LANGUAGE_NAMES = {"en": ("English", "英文"), "zh": ("Chinese", "中文")}
MARKS = {"en": ".!?", "zh": "。！？"}

# kind: (request in English, request in Chinese). The order is that of the request.
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
RIVALS = (
    ("even", "odd"),
    ("up", "down"),
    ("dashes", "numbered", "commas"),
    ("dashes", "numbered", "brackets"),
)
MEANING = ("even", "odd", "above", "below", "include", "avoid", "up", "down")
LAYOUT = ("dashes", "numbered", "commas", "brackets", "end")
KINDS = {"en": (*MEANING, "capitals", *LAYOUT), "zh": (*MEANING, *LAYOUT)}
HARD = {  # difficulty 4: letters of English words, or one word again and again
    ("count", "en"): (*KINDS["en"], "start", "forbid"),
    ("count", "zh"): KINDS["zh"],
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

    def draw(self, rng, difficulty):
        """Label: {"asked": language of the request, "constraints": {kind: value}, "language" of the answer in it}."""
        while True:
            asked, language = rng.choice(
                ["en en", "en en", "en zh", "zh zh", "zh zh", "zh en"]
            ).split()
            base = "count" if difficulty < 4 else rng.choice(["count", "repeat"])
            kinds = rng.sample(
                KINDS[language] if difficulty < 4 else HARD[base, language], min(difficulty, 3)
            )
            constraints = {base: rng.randint(2, 5)}
            if base == "repeat":
                constraints[base] = [constraints[base], rng.choice(WORDS[language])]
            constraints["language"] = language
            for kind in sorted(kinds, key=list(PHRASES).index):
                constraints[kind] = draw_value(rng, kind, language)
            possible = base == "repeat" or len(candidates(constraints)) >= constraints["count"]
            if possible and all(len({*kinds} & {*rivals}) < 2 for rivals in RIVALS):
                return [user(request(constraints, asked))], {
                    "asked": asked,
                    "constraints": constraints,
                }

    def oracle(self, task, conversation, rng):
        constraints = task.label["constraints"]
        if "repeat" in constraints:
            times, word = constraints["repeat"]
            words = [word] * times
        else:
            words = rng.sample(candidates(constraints), constraints["count"])
            wanted = constraints.get("include", words[0])
            words = [wanted, *[word for word in words if word != wanted]][: len(words)]
            if "up" in constraints or "down" in constraints:
                words.sort(key=VALUE.get, reverse="down" in constraints)
        return assistant(written(words, constraints), thought(words, constraints["language"]))

    def judge(self, task, message):
        text = message["content"].strip()
        words = split_words(text)
        parts = {
            kind: float(CHECKS[kind](words, text, value))
            for kind, value in task.label["constraints"].items()
        }
        return verdict(all(parts.values()), parts)

    def hack_probes(self, task):
        constraints = task.label["constraints"]
        every = WORDS[constraints["language"]]
        same = candidates(constraints)[:1] * constraints.get("count", 0)
        return (
            super().hack_probes(task)
            + [
                assistant(
                    " ".join(same) + constraints.get("end", "")
                ),  # a word that fits, again and again
                assistant(" ".join(every)),
                assistant(" ".join(every).upper() + "!"),
                assistant("\n".join("- " + word for word in every)),
                assistant("s sk sky st str"),  # not words
                assistant("", " ".join(every[:3])),
            ]
        )


def draw_value(rng, kind, language):
    """A random value for a constraint; None for those that have none."""
    choices = {
        "above": (2, 3, 4),
        "below": (6, 7, 8),
        "include": WORDS[language],
        "avoid": WORDS[language],
        "start": "fost",
        "forbid": "efinost",
        "end": MARKS[language],
    }
    return rng.choice(choices[kind]) if kind in choices else None


def candidates(constraints):
    """The words that each satisfy the constraints on single words; none if the word to include does not."""
    kinds = [
        kind
        for kind in ("even", "odd", "above", "below", "avoid", "start", "forbid")
        if kind in constraints
    ]
    words = [
        w
        for w in WORDS[constraints["language"]]
        if all(CHECKS[k]([w], w, constraints[k]) for k in kinds)
    ]
    return words if constraints.get("include", words[0] if words else "") in words else []


def request(constraints, asked):
    """The prompt, in the language `asked`. The language of the answer is not said when it is English, asked for in
    English, or shown by the word to repeat.
    """
    texts, column = [], int(asked == "zh")
    unsaid = "repeat" in constraints or constraints["language"] == asked == "en"
    for kind, value in constraints.items():
        if kind == "language":
            value = LANGUAGE_NAMES[value][column]
        if not (kind == "language" and unsaid):
            texts.append(
                PHRASES[kind][column].format(
                    *(value if isinstance(value, (list, tuple)) else (value,))
                )
            )
    return ("" if asked == "zh" else " ").join(texts)


def thought(words, language):
    """The words with their numbers: `1 six 2 two`, `1六2二`."""
    gap = " " if language == "en" else ""
    return gap.join(f"{number}{gap}{word}" for number, word in enumerate(words, 1))


def written(words, constraints):
    """The answer: the words in the form that the constraints ask for."""
    comma = ", " if constraints["language"] == "en" else "，"
    if "dashes" in constraints:
        text = "\n".join("- " + word for word in words)
    elif "numbered" in constraints:
        text = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    else:
        text = (comma if "commas" in constraints else " ").join(words)
    text = text.upper() if "capitals" in constraints else text
    return (f"({text})" if "brackets" in constraints else text) + constraints.get("end", "")


def inner(text):
    """An answer without its closing mark and the brackets around it."""
    text = re.sub(r"[.!?。！？]$", "", text)
    return re.sub(r"^[(（](.*)[)）]$", r"\1", text, flags=re.DOTALL)


def split_words(text):
    """The words of an answer: closing mark, brackets, list marks removed, split at spaces and commas, small letters."""
    text = re.sub(r"^(- |\d+\. )", "", inner(text), flags=re.MULTILINE)
    return [word for word in re.split(r"[\s,，、]+", text.lower()) if word]


def values(words):
    """The numbers that the words mean, 0 for a word that is none."""
    return [VALUE.get(word, 0) for word in words]


def is_list(words, text, marks):
    """Whether an answer has one word a line, each behind its mark."""
    lines = text.splitlines()
    return len(lines) == len(words) and all(
        line.startswith(mark) for line, mark in zip(lines, marks)
    )


CHECKS = {
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
