"""Ask a judge about an answer, one question at a time: a program, or a model behind `Generator` (paper 3.4).

    item  = name, question, and where there is one a program that answers it
    value = items that hold / items asked                         failed = names of the others

The rubric and the critic differ only in their items: the rubric's are the same for every answer, the critic's
are the sentences of the request. So they share one kind of judge, and say which item failed.

Choices: a model is asked for one word, and only yes and no count. Anything else is nonsense, and a judge that
raises or takes too long has not answered. In both cases the judgement has that status and no value: the
sample leaves all statistics, instead of teaching that the answer was bad.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from minglm.chat import render
from minglm.chat.messages import Message
from minglm.chat.stream import decode_turn
from minglm.data.tokenizer import Tokenizer
from minglm.inference.client import Generator
from minglm.inference.request import Request

ANSWERS = {"yes": True, "no": False, "是": True, "否": False}
MOST_TOKENS = 8
"""Bound on the tokens of a judge's reply."""


class JudgeStatus(StrEnum):
    """What became of a judgement."""

    OK = "ok"
    NONSENSE = "nonsense"
    """The judge said something else than yes or no."""
    UNANSWERED = "unanswered"
    """The judge raised an exception, or took too long."""


class JudgeFailed(Exception):
    """A judge gave no usable reply."""

    def __init__(self, status: JudgeStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True)
class Judged:
    """An answer to judge, with what its environment says of it."""

    prompt: Sequence[Message]
    message: Message
    tokens: Sequence[int] = ()
    """Prompt and answer as token ids, for a reward model."""
    score: float | None = None
    """What the environment's rules give, 0 to 1; None where no answer is right or wrong."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The parts of this score."""
    criteria: Mapping[str, str] = field(default_factory=dict)
    """The sentences of the request, each by the part that judges it."""
    faults: Mapping[str, bool] = field(default_factory=dict)
    """The flags of the detectors of pathologies."""


class Item(NamedTuple):
    """One question about an answer, to be answered by yes or no."""

    name: str
    question: str
    program: Callable[[Judged], bool]
    """Answers the question where no model is asked."""


class Judgement(NamedTuple):
    """What a judge says of an answer."""

    value: float | None
    """Share of the items that hold; None unless the status is ok, and where there are no items."""
    failed: tuple[str, ...] = ()
    """Names of the items that do not hold."""
    status: JudgeStatus = JudgeStatus.OK
    detail: str = ""


class Judge(Protocol):
    """Whatever answers a question about an answer."""

    async def ask(self, item: Item, judged: Judged) -> bool:
        """Return whether an item holds. Raises `JudgeFailed` where that cannot be said."""
        ...


class ProgramJudge:
    """A judge that runs the program of each item."""

    async def ask(self, item: Item, judged: Judged) -> bool:
        """Return what the item's program says."""
        return item.program(judged)


@dataclass(frozen=True)
class ModelJudge:
    """A judge that asks a language model, which sees the request, the answer and the question."""

    generator: Generator
    tokenizer: Tokenizer
    patience: float = 60.0
    """Seconds to wait for a reply."""

    async def ask(self, item: Item, judged: Judged) -> bool:
        """Return what the model says, yes or no.

        Raises `JudgeFailed` for any other reply, and where there is none.
        """
        question = (
            f"Request: {judged.prompt[-1]['content']}\nAnswer: {judged.message['content']}\n"
            f"{item.question} Reply yes or no."
        )
        messages = [{"role": "user", "content": question}]
        prompt = render(self.tokenizer, messages, thinking=False, generation_prompt=True).ids
        request = Request(prompt, max_new_tokens=MOST_TOKENS, temperature=0.0)
        try:
            completion = await asyncio.wait_for(self.generator.generate(request), self.patience)
        except Exception as error:  # whatever a judge fails at, the answer is not to blame
            raise JudgeFailed(
                JudgeStatus.UNANSWERED, f"{item.name}: {type(error).__name__}: {error}"
            ) from error
        reply = decode_turn(self.tokenizer, completion.tokens, ())["content"]
        answer = ANSWERS.get(reply.strip().strip(".。!！").lower())
        if answer is None:
            raise JudgeFailed(JudgeStatus.NONSENSE, f"{item.name}: {reply[:40]!r}")
        return answer


async def judge_items(judge: Judge, judged: Judged, items: Sequence[Item]) -> Judgement:
    """Ask all questions about one answer, at once."""
    try:
        holds = await asyncio.gather(*(judge.ask(item, judged) for item in items))
    except JudgeFailed as failure:
        return Judgement(None, status=failure.status, detail=str(failure))
    failed = tuple(item.name for item, held in zip(items, holds, strict=True) if not held)
    return Judgement(1 - len(failed) / len(items) if items else None, failed)
