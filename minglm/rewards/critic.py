"""Say which constraints of a request an answer breaks (paper 3.4, the critique model of instruction following).

    value = constraints that hold / constraints        failed = names of those that do not

The questions are the sentences of the request (`Task.criteria`). A program answers them from the parts of the
environment's score; a model reads them, so that a constraint that no program checks can be criticised as
well. The value is partial credit: a group whose answers are all wrong, but not equally so, still teaches
something.
"""

from minglm.rewards.judge import Item, Judge, Judged, Judgement, judge_items


def constraint(name: str, sentence: str) -> Item:
    """Return the question about one constraint."""
    return Item(
        name,
        f"Does the answer obey this: {sentence}",
        lambda judged: judged.parts.get(name, 0.0) > 0,
    )


async def criticise(judge: Judge, judged: Judged) -> Judgement:
    """Return the share of the constraints that hold, and those that do not; no value for a request without any."""
    items = [constraint(name, sentence) for name, sentence in judged.criteria.items()]
    return await judge_items(judge, judged, items)
