"""Constrain what stands between the numbers (paper 3.4: one of seven major kinds)."""

import json
from collections.abc import Callable
from typing import Any

from minglm.envs.constraints.answer import Answer, clean
from minglm.envs.constraints.kind import Kind

ON_LINES = ("layout", "wrapper")  # nothing goes around several lines


def _joined(
    separator: dict[str, str] | str, slots: tuple[str, ...] = ("layout",)
) -> dict[str, Any]:
    """Return checker and form of numbers with a separator between them, which may depend on the language."""
    by_language = separator if isinstance(separator, dict) else {"en": separator, "zh": separator}

    def holds(answer: Answer, value: None) -> bool:
        return len(answer.words) > 1 and any(
            [clean(piece) for piece in answer.inside.split(one)] == answer.words
            for one in by_language.values()
        )

    return {
        "holds": holds,
        "form": lambda value, language: {"separator": by_language[language]},
        "slots": slots,
    }


def _listed(marker: Callable[[int], str]) -> dict[str, Any]:
    """Return checker and form of a list: a number a line, after its marker."""

    def holds(answer: Answer, value: None) -> bool:
        lines = answer.inside.split("\n")
        if len(lines) != len(answer.words):
            return False
        for place, (line, word) in enumerate(zip(lines, answer.words, strict=True)):
            if not line.startswith(marker(place)) or clean(line[len(marker(place)) :]) != word:
                return False
        return True

    return {
        "holds": holds,
        "form": lambda value, language: {"separator": "\n", "marker": marker},
        "slots": ON_LINES,
    }


def _is_json(answer: Answer, value: None) -> bool:
    """Return whether the body is a JSON list of the words."""
    try:
        return json.loads(answer.body) == answer.words
    except (ValueError, RecursionError):
        return False


KINDS = (
    Kind(
        "commas",
        "With commas.",
        "用逗号隔开。",
        "two, six",
        "two; six",
        **_joined({"en": ", ", "zh": "，"}),
    ),
    Kind(
        "semicolons",
        "With semicolons.",
        "用分号隔开。",
        "two; six",
        "two, six",
        **_joined({"en": "; ", "zh": "；"}),
    ),
    Kind("slashes", "With slashes.", "用斜线隔开。", "two/six", "two, six", **_joined("/")),
    Kind("bars", "With bars.", "用竖线隔开。", "two | six", "two/six", **_joined(" | ")),
    Kind("pluses", "With pluses.", "用加号隔开。", "two + six", "two six", **_joined(" + ")),
    Kind("arrows", "With arrows.", "用箭头隔开。", "two -> six", "two - six", **_joined(" -> ")),
    Kind(
        "lines",
        "One on each line.",
        "每行一个。",
        "two\nsix",
        "two six",
        **_joined("\n", ON_LINES),
    ),
    Kind(
        "blank_lines",
        "With a blank line between.",
        "中间空一行。",
        "two\n\nsix",
        "two\nsix",
        **_joined("\n\n", ON_LINES),
    ),
    Kind(
        "dashes",
        "As a dash list.",
        "用-列出。",
        "- two\n- six",
        "* two\n* six",
        **_listed(lambda place: "- "),
    ),
    Kind(
        "stars",
        "As a star list.",
        "用*列出。",
        "* two\n* six",
        "- two\n- six",
        **_listed(lambda place: "* "),
    ),
    Kind(
        "numbered",
        "As a numbered list.",
        "用数字列出。",
        "1. two\n2. six",
        "1. two\n3. six",
        **_listed(lambda place: f"{place + 1}. "),
    ),
    Kind(
        "lettered",
        "As a lettered list.",
        "用字母列出。",
        "a) two\nb) six",
        "a) two\na) six",
        **_listed(lambda place: f"{'abcdefghijklmnopqrstuvwxyz'[place % 26]}) "),
    ),
    Kind(
        "json",
        "As JSON.",
        "用JSON。",
        '["two", "six"]',
        "[two, six]",
        _is_json,
        slots=("layout", "wrapper", "around_each"),
        form=lambda value, language: {
            "separator": ", ",
            "around_each": ('"', '"'),
            "around_all": ("[", "]"),
        },
    ),
)
