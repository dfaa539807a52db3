"""Held-out text on ranks: each reads a part, and all have the numbers of one process, to the last bit."""

import numpy as np
import pytest
from helpers.scripted import byte_tokenizer
from helpers.world import run_ranks

from minglm.common.ranks import Ranks
from minglm.eval import needles, text
from minglm.testing.model import tiny_model

LENGTH = 32


def scores(ranks):
    """Return bits per byte, acceptance, needles and bits by position of a tiny model, with a few rows a pass."""
    tokenizer = byte_tokenizer()
    model = tiny_model(1, vocab_size=tokenizer.vocab_size, max_position_embeddings=64).eval()
    model.requires_grad_(False)
    random = np.random.default_rng(3)
    documents = [random.integers(0, 256, size) for size in (70, 3, 40, 129, 33)]
    hidden = needles.written_needles(tokenizer, 5)
    with pytest.MonkeyPatch.context() as patch:
        for module in (text, needles):
            patch.setattr(module, "TOKENS_PER_PASS", 2 * LENGTH)
        return [
            text.bits_per_byte(model, tokenizer, documents, LENGTH, 10**6, ranks),
            text.mtp_acceptance(model, documents, LENGTH, 10**6, ranks),
            needles.needle_test(model, np.concatenate(documents), hidden, [60, 64], [0.5], ranks),
            needles.bits_by_position(model, tokenizer, documents, LENGTH, 10**6, ranks),
        ]


def divided_scores():
    """Return the scores, divided over the ranks, and how many passes of text this rank made."""
    ranks = Ranks.of_the_world()
    made = []
    divide = ranks.divide

    def counted(work, tasks):
        def one(task):
            made.append(task)
            return work(task)

        return divide(one, tasks)

    ranks.divide = counted
    return scores(ranks), len(made)


def test_ranks_divide_held_out_text_and_have_the_numbers_of_one_process():
    """Three ranks, whose passes are a third each, and more ranks than passes in some measurements."""
    wanted = scores(None)
    answers = run_ranks(divided_scores, 3)
    assert [found for found, _ in answers] == [wanted] * 3
    passes = [made for _, made in answers]
    assert max(passes) - min(passes) <= 5 and min(passes) > 0  # one for each division


def failing_rank():
    """Divide tasks of which one fails; return what is said of it."""
    with pytest.raises(ValueError) as caught:
        Ranks.of_the_world().divide(lambda task: 1 // task, [1, 0, 2])
    return str(caught.value)


def test_a_task_that_fails_fails_on_all_ranks():
    """In one line, which names the rank."""
    first, second = run_ranks(failing_rank, 2)
    assert first.startswith("rank 1: ") and "division" in first and second in first
