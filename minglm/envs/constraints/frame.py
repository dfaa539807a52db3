"""Constrain capitals, and what stands around the numbers: brackets, beginning, end (paper 3.4: one of seven major kinds)."""

from collections.abc import Callable
from typing import Any

from minglm.envs.constraints.answer import HEADINGS, OPENINGS, SIGN_OFFS, WRAPPERS, Answer
from minglm.envs.constraints.kind import ENGLISH, Kind
from minglm.envs.instructions import MARKS


def _cased(case: Callable[[list[str]], list[str]]) -> dict[str, Any]:
    """Return checker and form of words in a certain case."""
    return {
        "holds": lambda answer, value: (
            answer.words == case([word.lower() for word in answer.words])
        ),
        "form": lambda value, language: {"case": case},
        "slots": ("case",),
        "languages": ENGLISH,
    }


def _around_all(*begins: str) -> dict[str, Any]:
    """Return checker and form of something around all numbers; the first of `begins` is what the oracle writes."""
    return {
        "holds": lambda answer, value: answer.wrapper in begins,
        "form": lambda value, language: {"around_all": (begins[0], WRAPPERS[begins[0]])},
        "slots": ("wrapper", "around_each"),
    }


def _around_each(*begins: str) -> dict[str, Any]:
    """Return checker and form of something around each number, the same around all; `begins` as in `_around_all`."""

    def holds(answer: Answer, value: None) -> bool:
        return any(
            answer.pieces == [begin + word + WRAPPERS[begin] for word in answer.words]
            for begin in begins
        )

    return {
        "holds": holds,
        "form": lambda value, language: {"around_each": (begins[0], WRAPPERS[begins[0]])},
        "slots": ("around_each",),
    }


KINDS = (
    Kind(
        "capitals",
        "All capitals.",
        "全部大写。",
        "TWO SIX",
        "TWO Six",
        **_cased(lambda words: [word.upper() for word in words]),
    ),
    Kind(
        "titles",
        "A capital for each.",
        "每个首字母大写。",
        "Two Six",
        "Two six",
        **_cased(lambda words: [word.capitalize() for word in words]),
    ),
    Kind(
        "first_capital",
        "A capital for the first only.",
        "只有第一个首字母大写。",
        "Two six",
        "Two Six",
        **_cased(lambda words: [word.capitalize() for word in words[:1]] + words[1:]),
    ),
    Kind(
        "last_capitals",
        "The last in capitals.",
        "最后一个大写。",
        "two SIX",
        "TWO SIX",
        **_cased(lambda words: words[:-1] + [word.upper() for word in words[-1:]]),
    ),
    Kind(
        "brackets", "In brackets.", "放在括号里。", "(two six)", "two six", **_around_all("(", "（")
    ),
    Kind(
        "square",
        "In square brackets.",
        "放在方括号里。",
        "[two six]",
        "(two six)",
        **_around_all("["),
    ),
    Kind(
        "curly",
        "In curly brackets.",
        "放在花括号里。",
        "{two six}",
        "(two six)",
        **_around_all("{"),
    ),
    Kind("quotes", "In quotes.", "放在引号里。", '"two six"', "two six", **_around_all('"', "“")),
    Kind("bold", "In bold.", "用粗体。", "**two six**", "*two six*", **_around_all("**")),
    Kind("code", "As code.", "用代码格式。", "`two six`", "two six", **_around_all("`")),
    Kind(
        "each_brackets",
        "Each in brackets.",
        "每个放在括号里。",
        "(two) (six)",
        "(two six)",
        **_around_each("(", "（"),
    ),
    Kind(
        "each_quotes",
        "Each in quotes.",
        "每个放在引号里。",
        '"two" "six"',
        '"two six"',
        **_around_each('"', "“"),
    ),
    Kind(
        "each_bold",
        "Each in bold.",
        "每个用粗体。",
        "**two** **six**",
        "**two six**",
        **_around_each("**"),
    ),
    Kind(
        "begin",
        "Begin with {}",
        "以{}开头。",
        "Answer: two six",
        "two six",
        lambda answer, value: answer.opening == value,
        values=OPENINGS,
        example="Answer:",
        slots=("beginning",),
        form=lambda value, language: {"before": f"{value}\n"},
    ),
    Kind(
        "heading",
        "With the heading {}",
        "加标题{}",
        "# List\ntwo six",
        "List\ntwo six",
        lambda answer, value: answer.heading == value,
        values=HEADINGS,
        example="# List",
        slots=("beginning",),
        form=lambda value, language: {"before": f"{value}\n"},
    ),
    Kind(
        "end",
        "End with {}",
        "以{}结尾。",
        "two six!",
        "two six.",
        lambda answer, value: answer.closing == value,
        values=MARKS,
        example="!",
        slots=("end",),
        form=lambda value, language: {"after": value},
    ),
    Kind(
        "dots",
        "End with three dots.",
        "以三个点结尾。",
        "two six...",
        "two six.",
        lambda answer, value: answer.closing in ("...", "…"),
        slots=("end",),
        form=lambda value, language: {"after": "..."},
    ),
    Kind(
        "sign_off",
        "Say {} at the end.",
        "最后说{}。",
        "two six\nDone",
        "Done two six",
        lambda answer, value: answer.closing == value,
        values=SIGN_OFFS,
        example="Done",
        slots=("end",),
        form=lambda value, language: {"after": f"\n{value}"},
    ),
)
