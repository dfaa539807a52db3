"""Judge an answer by a rubric: a list of questions, one for tasks with a right answer and one for the others (paper 3.4).

    with an objective truth      right?  without faults of form?
    without                      anything said?  in one language?  no repetition?  well formed?  not the request itself?

The paper has separate rubrics for both cases: where a right answer exists, a rubric that praises manner would
pay for wrong answers in a good manner.

A rubric whose questions do not look at the request can be pleased by one answer to everything; lesson 17 has
one, and shows what becomes of it alone and beside rules and a critic.
"""

from collections.abc import Sequence

from minglm.rewards.judge import Item, Judge, Judged, Judgement, judge_items


def _text(judged: Judged) -> str:
    """Return the visible part of an answer."""
    return judged.message["content"].strip()


def _fault(name: str, question: str) -> Item:
    """Return the question whether a fault of form is absent."""
    return Item(name, question, lambda judged: not judged.faults.get(name, False))


FORM = (
    _fault("repetition", "Is the answer free of endless repetition?"),
    _fault("language_mixing", "Is the answer in one language?"),
    _fault("format", "Is the answer well formed?"),
)
OBJECTIVE = (
    Item("right", "Is the answer right?", lambda judged: judged.score == 1),
    *FORM,
)
OPEN = (
    Item("substance", "Does the answer say something?", lambda judged: bool(_text(judged))),
    Item(
        "own_words",
        "Is the answer more than the request said again?",
        lambda judged: _text(judged) != judged.prompt[-1]["content"].strip(),
    ),
    *FORM,
)


async def judge_by_rubric(
    judge: Judge, judged: Judged, items: Sequence[Item] | None = None
) -> Judgement:
    """Return the share of a rubric's questions that are answered by yes.

    items: the questions; None: those for answers with an objective truth, or without, as this answer has one.
    """
    if items is None:
        items = OPEN if judged.score is None else OBJECTIVE
    return await judge_items(judge, judged, items)
