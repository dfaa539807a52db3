"""Verifiable instructions in English and Chinese (paper 3.4, instruction-following RL, Figure 9).

    Write 4 words. Topic nature. With commas.       think: 1 sky 2 star 3 sun 4 sea     sky, star, sun, sea
    用中文写3个词。要有“月”。以！结尾。                    think: 1月2山3雨                    月 山 雨！

Every request fixes how many words and in which language; the tier is the number of further constraints, 1 to 3, on
topic and form. Tier 4 has three too, and they may be about letters, or one word is to be repeated. The reward is 1 when
all of them hold and 0 otherwise (strict); `parts` has each constraint by itself, so partial progress is visible in the
logs.

Choices: the checks are programs, as in the paper's deterministic verification rules, and never a model. The word list
belongs to the oracle and, except for topics, not to the check: another real word is as good. So that word-shaped noise
earns little, words must be distinct, have two letters or more and a vowel; `parts["known"]` is the share of words on
the list, and a reward that rises while it falls means the check is being gamed. The oracle thinks by numbering its
words: a count that is written down need not be kept in mind. There are thousands of different requests, so that
following them is easier than learning them by heart; constraints on the letters of a word are left to tier 4, because a
tokenizer hides letters.

Simplification: the paper combines these rules with a reward model and critiques; here rules stand alone.
"""

import re

from minglm.envs.base import SingleTurn, assistant, user, verdict

# topic: (its name in Chinese, English words, Chinese words)
TOPICS = {
    "time": ("时间", "day hour week minute month year night date", "年 月 日 时 分 秒 春 夏"),
    "body": ("身体", "head hand eye ear arm leg foot back", "头 手 口 眼 耳 心 足 背"),
    "nature": ("自然", "sun moon star sea rain sky wind rock", "山 水 火 风 雨 星 地 天"),
    "animals": ("动物", "cat dog cow pig hen bird fish horse", "猫 狗 马 牛 羊 鸟 虎 鱼"),
    "numbers": ("数字", "one two three four five six seven eight", "一 二 三 四 五 六 七 八"),
    "home": ("家", "door room table bed lamp wall key box", "门 床 灯 墙 桌 房 书 碗"),
}
ON_TOPIC = {topic: {*english.split(), *chinese.split()} for topic, (_, english, chinese) in TOPICS.items()}
WORDS = {
    "en": [word for _, english, _ in TOPICS.values() for word in english.split()],
    "zh": [word for _, _, chinese in TOPICS.values() for word in chinese.split()],
}
MARKS = {"en": ".!?", "zh": "。！？"}
STARTS = "bcdfhmnrstw"
FORBIDDEN = "aeiort"

# kind: (request in English, request in Chinese). The order is that of the request.
PHRASES = {
    "count": ("Write {} words.", "写{}个词。"),
    "repeat": ("Say {1} {0} times.", "说{0}遍“{1}”。"),
    "language": ("In {}.", "用{}。"),
    "topic": ("Topic {}.", "主题{}。"),
    "start": ("Start each with {}.", "每个以{}开头。"),
    "forbid": ("No letter {}.", "不用字母{}。"),
    "include": ("Use {}.", "要有“{}”。"),
    "alphabetical": ("In alphabetical order.", "按字母顺序。"),
    "capitals": ("All capitals.", "全部大写。"),
    "dashes": ("As a dash list.", "用-列出。"),
    "numbered": ("As a numbered list.", "用数字列出。"),
    "commas": ("With commas.", "用逗号隔开。"),
    "brackets": ("In brackets.", "放在括号里。"),
    "end": ("End with {}", "以{}结尾。"),
}
LANGUAGE_NAMES = {"en": ("English", "英文"), "zh": ("Chinese", "中文")}
LAYOUTS = ("dashes", "numbered", "commas")
FORMS = {
    "en": ("topic", "include", "capitals", *LAYOUTS, "brackets", "end"),
    "zh": ("topic", "include", *LAYOUTS, "brackets", "end"),
}
LETTERS = ("start", "forbid", "alphabetical")  # of English words
HARD = {
    ("count", "en"): FORMS["en"] + LETTERS,
    ("count", "zh"): FORMS["zh"],
    ("repeat", "en"): ("capitals", *LAYOUTS, "brackets", "end"),
    ("repeat", "zh"): (*LAYOUTS, "brackets", "end"),
}


class Instructions(SingleTurn):
    """Write some words under one to three constraints beside number and language; tier 4 is the hardest."""

    name = "instructions"
    group = "chat"
    chance = 0.05
    tiers = (1, 2, 3, 4)
    default_tiers = (1, 2, 3)

    def draw(self, rng, tier):
        """Label: {"language": of the answer, "asked": of the request, "constraints": {kind: value}}."""
        while True:
            asked, language = rng.choice(["en en", "en en", "en zh", "zh zh", "zh zh", "zh en"]).split()
            base = "count" if tier < 4 else rng.choice(["count", "repeat"])
            kinds = rng.sample(FORMS[language] if tier < 4 else HARD[base, language], min(tier, 3))
            if not compatible(kinds):
                continue
            constraints = {base: rng.randint(2, 5)}
            if base == "repeat":
                constraints[base] = [constraints[base], rng.choice(WORDS[language])]
            constraints["language"] = language
            for kind in sorted(kinds, key=list(PHRASES).index):
                constraints[kind] = draw_value(rng, kind, language)
            if base == "repeat" or len(candidates(constraints)) >= constraints["count"]:
                return [user(request(constraints, asked))], {"asked": asked, "constraints": constraints}

    def oracle(self, task, conversation, rng):
        constraints = task.label["constraints"]
        if "repeat" in constraints:
            times, word = constraints["repeat"]
            words = [word] * times
        else:
            words = rng.sample(candidates(constraints), constraints["count"])
            wanted = constraints.get("include", words[0])
            words = [wanted, *[word for word in words if word != wanted]][: len(words)]
            if "alphabetical" in constraints:
                words.sort()
        return assistant(written(words, constraints), numbered(words, constraints["language"]))

    def judge(self, task, message):
        constraints = task.label["constraints"]
        text = message["content"].strip()
        words = split_words(text)
        parts = {kind: float(CHECKS[kind](words, text, value)) for kind, value in constraints.items()}
        known = sum(word in WORDS[constraints["language"]] for word in words) / max(1, len(words))
        return verdict(all(parts.values()), parts | {"known": known})

    def hack_probes(self, task):
        constraints = task.label["constraints"]
        every = WORDS[constraints["language"]]
        same = candidates(constraints)[:1] * constraints.get("count", 0)
        return (
            super().hack_probes(task)
            + [
                assistant(" ".join(same) + constraints.get("end", "")),  # a word that fits, again and again
                assistant(" ".join(every)),
                assistant(" ".join(every).upper() + "!"),
                assistant("\n".join("- " + word for word in every)),
                assistant("s sk sky st str"),  # not words
                assistant("", " ".join(every[:3])),
            ]
        )


def compatible(kinds):
    """Whether these constraints go together: one layout at most, and no brackets around a list."""
    return all(len({*kinds} & {*rivals}) < 2 for rivals in (LAYOUTS, ("dashes", "numbered", "brackets")))


def draw_value(rng, kind, language):
    """A random value for a constraint; None for those that have none."""
    if kind in ("start", "forbid"):
        return rng.choice(STARTS if kind == "start" else FORBIDDEN)
    if kind == "topic":
        return rng.choice(list(TOPICS))
    if kind == "include":
        return rng.choice(WORDS[language])
    return rng.choice(MARKS[language]) if kind == "end" else None


def candidates(constraints):
    """Listed words that each satisfy the constraints on single words; none if the word to include does not."""
    start, forbidden = constraints.get("start", ""), constraints.get("forbid", "-")
    words = [w for w in WORDS[constraints["language"]] if w.startswith(start) and forbidden not in w]
    words = [w for w in words if w in ON_TOPIC.get(constraints.get("topic"), words)]
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
        if kind == "topic" and asked == "zh":
            value = TOPICS[value][0]
        if not (kind == "language" and unsaid):
            texts.append(PHRASES[kind][column].format(*(value if isinstance(value, (list, tuple)) else (value,))))
    return ("" if asked == "zh" else " ").join(texts)


def numbered(words, language):
    """The thought: the words with their numbers."""
    pairs = [f"{number}{' ' if language == 'en' else ''}{word}" for number, word in enumerate(words, 1)]
    return (" " if language == "en" else "").join(pairs)


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
    """The words of an answer: closing mark, brackets, dashes and numbers of a list removed, split at spaces and commas."""
    text = re.sub(r"^(- |\d+\. )", "", inner(text), flags=re.MULTILINE)
    return [word for word in re.split(r"[\s,，、]+", text.lower()) if word]


def is_word(word, language):
    """Whether a string looks like a word of the language: letters with a vowel, or Chinese characters."""
    if language == "zh":
        return re.fullmatch(r"[\u4e00-\u9fff]{1,4}", word) is not None
    return re.fullmatch(r"(?=.*[aeiouy])[a-z]{2,12}", word) is not None


def is_list(words, text, marks):
    """Whether an answer has one word a line, each behind its mark."""
    lines = text.splitlines()
    return len(lines) == len(words) and all(line.startswith(mark) for line, mark in zip(lines, marks))


CHECKS = {
    "count": lambda words, text, value: len(words) == len(set(words)) == value,
    "repeat": lambda words, text, value: words == [value[1]] * value[0],
    "language": lambda words, text, value: bool(words) and all(is_word(word, value) for word in words),
    "topic": lambda words, text, value: all(word in ON_TOPIC[value] for word in words),
    "start": lambda words, text, value: all(word.startswith(value) for word in words),
    "forbid": lambda words, text, value: value not in text.lower(),
    "include": lambda words, text, value: value in words,
    "alphabetical": lambda words, text, value: words == sorted(words),
    "capitals": lambda words, text, value: text == text.upper() != "",
    "dashes": lambda words, text, value: is_list(words, text, ["- "] * len(words)),
    "numbered": lambda words, text, value: is_list(words, text, [f"{n}. " for n in range(1, len(words) + 1)]),
    "commas": lambda words, text, value: re.split(r", |，", inner(text).lower()) == words,
    "brackets": lambda words, text, value: re.fullmatch(r"[(（].*[)）][.!?。！？]?", text, re.DOTALL) is not None,
    "end": lambda words, text, value: text.endswith(value),
}
"""Each check takes the words in lower case, the stripped answer, and the constraint's value."""
