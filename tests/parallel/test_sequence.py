"""A row that ranks share gives the outputs, losses and gradients of the whole row."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from einops import repeat
from helpers.tiny import drawn_batch
from helpers.world import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from minglm.kernels.attention import flash_attention
from minglm.model.moe import MoE
from minglm.parallel.sequence import HeadExchange, RowPart, cut, share_sequences
from minglm.testing.model import tiny_model
from minglm.testing.parallel import check_sequence_exchange
from minglm.testing.strategies import seeds
from minglm.train.loss import (
    AFTER_NEXT,
    NEXT_TOKEN,
    LossWeights,
    batch_targets,
    count_targets,
    training_loss,
)


@given(
    seed=seeds,
    B=st.integers(1, 3),
    length=st.integers(1, 5),
    ranks=st.integers(2, 5),
    packed=st.booleans(),
)
def test_parts_of_a_row_have_the_targets_of_the_row(seed, B, length, ranks, packed):
    """Put together, the parts have every token, position and document once, and the targets that lie beyond their cuts."""
    whole = drawn_batch(seed, B, length * ranks, packed)
    parts = [cut(whole, RowPart(rank, ranks)) for rank in range(ranks)]
    inputs = [part.inputs() for part in parts]
    assert torch.equal(torch.cat([part.tokens_BS for part in inputs], 1), whole.tokens_BS)
    positions_BS = torch.cat([part.positions_BS for part in inputs], 1)
    wanted_BS = torch.arange(length * ranks).expand(B, -1)
    assert torch.equal(positions_BS, whole.positions_BS if packed else wanted_BS)
    if packed:
        assert torch.equal(torch.cat([part.documents_BS for part in inputs], 1), whole.documents_BS)
    for offset in (NEXT_TOKEN, AFTER_NEXT):
        targets = [batch_targets(part, offset) for part in parts]
        expected = batch_targets(whole, offset)
        assert torch.equal(torch.cat([t.tokens_BS for t in targets], 1), expected.tokens_BS)
        assert torch.equal(torch.cat([t.counts_BS for t in targets], 1), expected.counts_BS)


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchange_of_heads_keeps_the_contract(ranks):
    """Attention over rows that ranks share is that over whole rows, with more, as many and fewer heads than ranks."""
    run_ranks(check_sequence_exchange, ranks, HeadExchange)


def alone(group):
    """The trap: each rank attends over its own positions only."""
    return flash_attention


class ForgetsDocuments(HeadExchange):
    """Documents of this rank's positions do not fit whole rows, so they are left out."""

    def _whole_rows(self, documents_BS):
        return None


class TilesHeads(HeadExchange):
    """Copies of key/value heads 0 1 0 1 instead of 0 0 1 1: queries meet the keys of another group."""

    def __call__(self, q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
        copies = max(1, self.ranks // k_BSMA.shape[2])
        tiled = [repeat(x, "b s m a -> b s (copies m) a", copies=copies) for x in (k_BSMA, v_BSMA)]
        return super().__call__(q_BSNA, *tiled, documents_BS)


class ForgetsGradients(HeadExchange):
    """A collective that autograd does not know: the gradient of other ranks' positions is lost."""

    def _exchange(self, x):
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.detach().contiguous(), group=self.group)
        return x + (out - x).detach()


@pytest.mark.parametrize(
    ("twin", "message"),
    [
        (alone, "attention differs"),
        (ForgetsDocuments, "attention differs"),
        (TilesHeads, "attention differs"),
        (ForgetsGradients, "the gradient of"),
    ],
)
def test_contract_refuses_broken_twins(twin, message):
    """Each known way to get the exchange wrong fails the contract, on all ranks at once."""
    with pytest.raises(Exception, match=message):
        run_ranks(check_sequence_exchange, 4, twin)


LATENT = {
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "head_dim": 8,
    "v_head_dim": 5,
    "num_key_value_heads": 4,
    "use_qk_norm": False,
}
CASES = [
    {"packed": False},
    {"packed": True},
    {"packed": True, "recompute": True},
    {"packed": True, "changes": LATENT},
]


def compare(case, broken=False):
    """Return the errors of a training loss and its gradients, with each row shared among all ranks.

    broken: each rank's balance loss is that of its own positions.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    weights = LossWeights(mtp=0.3, balance=0.5)
    batch = drawn_batch(3, 2, 16 * ranks, case["packed"])
    results = []
    for shared in (False, True):
        model = tiny_model(7, **case.get("changes", {}))
        model.recompute = case.get("recompute", False)
        if shared:
            share_sequences(model, dist.group.WORLD)
            for module in model.modules():
                if broken and isinstance(module, MoE):
                    module.sum_over_row = lambda counts: counts
        counts = count_targets(model, batch, weights)
        part = cut(batch, RowPart(rank, ranks)) if shared else batch
        terms = training_loss(model, part, counts, weights)
        terms.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        losses = torch.stack([terms.loss, terms.cross_entropy, terms.mtp, terms.balance]).detach()
        loads = terms.tokens_per_expert_LE
        if shared:
            for tensor in (losses, loads, *found.values()):
                dist.all_reduce(tensor)
        results.append((losses, loads, found))
    (losses, loads, wanted), (shared_losses, shared_loads, found) = results
    errors = {name: ((found[name] - g).norm() / g.norm()).item() for name, g in wanted.items()}
    return (
        ((losses - shared_losses) / losses).abs().max().item(),
        torch.equal(loads, shared_loads) and wanted.keys() == found.keys(),
        max(errors.values()),
        max(errors, key=errors.get),
    )


def compare_all():
    """Return the comparison of every case."""
    return [compare(case) for case in CASES]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_model_on_shared_rows_has_the_gradients_of_whole_rows(ranks):
    """Losses, loads and every gradient, through trunk, MTP layer, experts and balance loss, packed or not."""
    for case, (loss, equal, gradient, name) in zip(
        CASES, run_ranks(compare_all, ranks)[0], strict=True
    ):
        assert loss < 1e-5 and equal, case  # float32: sums in another order
        assert gradient < 2e-6, (case, name)


def test_a_balance_loss_of_single_parts_is_found():
    """The broken twin: a balance loss over each rank's part of a row is another loss."""
    loss, _, gradient, _ = run_ranks(compare, 2, CASES[0], True)[0]
    assert loss > 1e-4 and gradient > 1e-5


def test_cut_keeps_what_is_ahead_in_microbatches():
    """A part of rows, split into micro-batches, still knows how many positions are targets only."""
    part = cut(drawn_batch(1, 3, 8, True), RowPart(0, 2))
    assert part.ahead == 2 and [piece.ahead for piece in part.split(1)] == [2, 2, 2]
    assert dataclasses.replace(part, ahead=0).inputs().tokens_BS.shape == (3, 6)
    assert cut(drawn_batch(1, 3, 8, True), RowPart(1, 2)).ahead == 0
