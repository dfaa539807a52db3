"""Deal requests of a whole taxonomy of constraints, and of kinds that training does not have (paper 3.4, Figure 9).

    Write 3 or more numbers. Smallest first. With bars.       think: 1 two 2 four 3 nine      two | four | nine
    用英文写3到5个数。最大的是six。每个放在括号里。                think: 1 six 2 one 3 two       (six) (one) (two)

The environment `instructions` asks for 19 kinds of constraints; here are 99, in seven major kinds
(`taxonomy`). The paper has 151 in seven. The difficulty is the number of constraints beside that on the
count, 1 to 5. The reward is 1 when all hold; `parts` has each of them by its name, and `Task.criteria` its
sentence, so that a critic can say what was broken.

`unseen_constraints` deals requests with at least one of 20 kinds that `constraints` never has. A policy that
learnt to read requests obeys them better after RL on the others; one that learnt which answers are paid does
not (Figure 9).

Choices: content is nine number words, as in `instructions`, and the oracle numbers them in thought. Words
that are no number, but the phrase that was asked for, break the part `language`. Label: language of request
and answer, constraints, and an answer that obeys (`witness`), which the oracle says.
"""

import random
from collections.abc import Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Score, SingleTurn, Task, assistant, user, verdict
from minglm.envs.constraints.answer import Answer, read, write
from minglm.envs.constraints.taxonomy import KINDS, counter_example, draw, form_of
from minglm.envs.instructions import LANGUAGE_NAMES, LANGUAGES, WORDS, thought


class Constraints(SingleTurn):
    """Write numbers under one to five constraints beside their count, of the kinds that are trained."""

    name = "constraints"
    group = "chat"
    chance = 0.1
    difficulties = (1, 2, 3, 4, 5)
    default_difficulties = (1, 2, 3)
    shown_difficulties = (1, 2)
    unseen = False
    """Whether each request has a kind that training does not have; otherwise none has."""

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random request as (messages, label)."""
        asked, language = rng.choice(LANGUAGES).split()
        constraints, witness = draw(rng, language, difficulty, self.unseen)
        label = {
            "asked": asked,
            "language": language,
            "constraints": constraints,
            "witness": witness,
        }
        gap = "" if asked == "zh" else " "
        return [user(gap.join(sentences(label).values()))], label

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return language and constraints, in whatever language they are put."""
        return [label["language"], label["constraints"]]

    def expected_language(self, label: Any) -> str | None:
        """Return the language of the answer."""
        return label["language"]

    def criteria(self, label: Any) -> dict[str, str]:
        """Return the sentence of every constraint."""
        return sentences(label)

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the answer of the label in the form that is asked for, with its words numbered as reasoning."""
        label = task.label
        language = label["language"]
        words = [WORDS[language][number - 1] for number in label["witness"]]
        text = write(label["witness"], language, form_of(label["constraints"], language))
        return assistant(text, thought(words, language))

    def spoilt(self, task: Task, rng: random.Random) -> Message | None:
        """Return an answer that breaks one constraint and no other; None where the draws find none."""
        label = task.label
        names = list(label["constraints"])
        for broken in rng.sample(names, len(names)):
            text = counter_example(
                rng, label["constraints"], label["witness"], label["language"], broken
            )
            if text is not None:
                return assistant(text)
        return None

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if every constraint holds; `parts` has each of them."""
        label = task.label
        answer = read(message["content"])
        parts = {"language": float(only_numbers(answer, label["language"], label["constraints"]))}
        for name, value in label["constraints"].items():
            parts[name] = float(KINDS[name].obeyed(answer, value))
        return verdict(all(parts.values()), parts)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return numbers beside a word that is none, numbers in both languages, digits, and an answer that is only thought."""
        content = self.oracle(task, task.messages, random.Random(0))["content"]
        return super().hack_probes(task) + [
            assistant(content + " sk"),
            assistant("sk " + content),
            assistant(" ".join(WORDS["en"] + WORDS["zh"])),
            assistant("1 2 3"),
            assistant("", content),
        ]


class UnseenConstraints(Constraints):
    """The same with at least one kind that `Constraints` never asks for."""

    name = "unseen_constraints"
    unseen = True


def sentences(label: dict[str, Any]) -> dict[str, str]:
    """Return the sentences of a request by the part that judges them; English is not stated to one who asks in English."""
    asked = label["asked"]
    language = label["language"]
    said = {}
    for name, value in label["constraints"].items():
        said[name] = KINDS[name].sentence(value, asked, language)
        if "language" not in said and not asked == language == "en":
            title = LANGUAGE_NAMES[language][asked == "zh"]
            said["language"] = f"用{title}。" if asked == "zh" else f"In {title}."
    return said


def only_numbers(answer: Answer, language: str, constraints: dict[str, Any]) -> bool:
    """Return whether an answer has numbers of the language, and nothing else but the phrases that were asked for."""
    phrases = {
        "begin": answer.opening,
        "heading": answer.heading,
        "sign_off": answer.closing if answer.closing.isalpha() else "",
    }
    extra = any(phrase and name not in constraints for name, phrase in phrases.items())
    known = all(word.lower() in WORDS[language] for word in answer.words)
    return bool(answer.words) and known and not extra
