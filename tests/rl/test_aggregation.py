"""Loss aggregation: three formulas, one denominator for the whole batch, and nothing read where the mask is False."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config.posttraining import Aggregation
from minglm.rl.aggregation import aggregate, denominator
from minglm.testing.rl import check_aggregation
from minglm.testing.strategies import numbers, seeds, shapes


def test_contract_holds():
    """Formula, pieces, junk under the mask, empty batch."""
    check_aggregation(aggregate)


def mean_per_piece(loss_BS, mask_BS, mode, denominator):
    """Broken: ignore the batch's denominator, so that every micro-batch weighs the same."""
    return aggregate(
        loss_BS, mask_BS, mode, 7 * mask_BS.any(1).sum() if mode == "constant" else None
    )


def product_with_mask(loss_BS, mask_BS, mode, denominator):
    """Broken: multiply by the mask, so that NaN at a masked position survives."""
    return (loss_BS * mask_BS).sum() / max(1, int(denominator))


def unguarded(loss_BS, mask_BS, mode, denominator):
    """Broken: divide by zero when nothing is to be learned."""
    return aggregate(loss_BS, mask_BS, mode, 1) / torch.as_tensor(denominator)


def always_token(loss_BS, mask_BS, mode, denominator):
    """Broken: forget that sequence mode averages within a sample first."""
    return aggregate(loss_BS, mask_BS, "token", denominator)


@pytest.mark.parametrize("broken", [mean_per_piece, product_with_mask, unguarded, always_token])
def test_contract_finds_the_broken_twin(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_aggregation(broken)


@given(seed=seeds, shape=shapes, mode=st.sampled_from(list(Aggregation)), cut=st.integers(0, 6))
def test_denominators_of_pieces_add_up(seed, shape, mode, cut):
    """Ranks that count their own rows and sum the counts know the denominator of the whole batch."""
    mask_BS = torch.rand(shape, generator=numbers(seed)) < 0.3
    pieces = denominator(mask_BS[:cut], mode, 5) + denominator(mask_BS[cut:], mode, 5)
    assert pieces == denominator(mask_BS, mode, 5)


@given(
    seed=seeds,
    pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    mode=st.sampled_from(list(Aggregation)),
    order=st.randoms(use_true_random=False),
)
def test_a_trajectory_of_several_rows_counts_once(seed, pieces, mode, order):
    """Cut into rows, in any order and any micro-batches, a trajectory weighs what it weighs as one row."""
    width = 4
    whole_BS = []
    rows = []
    for owner, count in enumerate(pieces):
        loss_S = torch.randn(3 * width, generator=numbers(seed + owner))
        mask_S = torch.rand(3 * width, generator=numbers(seed + 100 + owner)) < 0.5
        mask_S[count * width :] = False  # as many rows as it has pieces
        whole_BS.append((loss_S, mask_S))
        for i in range(count):
            part = slice(i * width, (i + 1) * width)
            rows.append((loss_S[part], mask_S[part], owner, int(mask_S.sum())))
    order.shuffle(rows)
    loss_BS, mask_BS = (torch.stack(part) for part in zip(*whole_BS, strict=True))
    expected = aggregate(loss_BS, mask_BS, mode, denominator(mask_BS, mode, 7))

    losses, masks, owners, tokens = zip(*rows, strict=True)
    loss_BS, mask_BS = torch.stack(losses), torch.stack(masks)
    owners_B, tokens_B = torch.tensor(owners), torch.tensor(tokens)
    total = denominator(mask_BS, mode, 7, owners_B)
    found = sum(
        aggregate(loss_BS[i : i + 1], mask_BS[i : i + 1], mode, total, tokens_B[i : i + 1])
        for i in range(len(rows))
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)  # float32 sums of 48 numbers


@given(seed=seeds, shape=shapes)
def test_modes_agree_on_equal_lengths(seed, shape):
    """Where every sample has the same number of tokens, all modes are the same mean."""
    loss_BS = torch.randn(shape, generator=numbers(seed))
    mask_BS = torch.ones(shape, dtype=torch.bool)
    values = [
        aggregate(loss_BS, mask_BS, mode, denominator(mask_BS, mode, shape[1]))
        for mode in list(Aggregation)
    ]
    # float32, another order of summation.
    torch.testing.assert_close(values[1:], values[:1] * 3, atol=1e-5, rtol=0)


@given(seed=seeds, shape=shapes, mode=st.sampled_from(list(Aggregation)), rows=st.integers(1, 3))
def test_padding_rows_do_not_count(seed, shape, mode, rows):
    """Rows without any target, as padding and failed episodes are, change nothing."""
    loss_BS = torch.randn(shape, generator=numbers(seed))
    mask_BS = torch.rand(shape, generator=numbers(seed + 1)) < 0.5
    longer_BS = torch.cat([mask_BS, torch.zeros(rows, shape[1], dtype=torch.bool)])
    padded = aggregate(
        torch.cat([loss_BS, loss_BS.new_ones(rows, shape[1])]),
        longer_BS,
        mode,
        denominator(longer_BS, mode, 9),
    )
    torch.testing.assert_close(
        padded, aggregate(loss_BS, mask_BS, mode, denominator(mask_BS, mode, 9))
    )


def test_user_mistakes_are_one_line():
    """An unknown mode, and a constant mode without its constant, say what to do."""
    mask_BS = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="must be one of token, sequence, prompt, constant"):
        aggregate(torch.zeros(2, 3), mask_BS, "mean")
    with pytest.raises(ValueError, match="needs a length"):
        aggregate(torch.zeros(2, 3), mask_BS, "constant")
