"""Embedding and output head: lookups, logits, losses and log-probabilities of one matrix."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minglm.model.embedding import Embedding, LMHead
from minglm.testing.model import normal, tiny_model
from minglm.testing.strategies import numbers, seeds

PACKAGE = Path(__file__).parents[2] / "minglm"


def head(seed, V=9, D=6):
    """Return a head with drawn weights."""
    module = LMHead(V, D)
    with torch.no_grad():
        module.weight.copy_(normal(seed, V, D))
    return module


@given(seed=seeds, T=st.integers(1, 12))
def test_losses_of_the_head_follow_from_its_logits(seed, T):
    """The weighted cross-entropy, the log-probabilities and the entropies are those of the logits, with gradients."""
    module = head(seed)
    hidden_TD = normal(seed + 1, T, 6).requires_grad_()
    targets_T = torch.randint(0, 9, (T,), generator=numbers(seed + 2))
    weights_T = (torch.rand(T, generator=numbers(seed + 3)) - 0.3).clamp(min=0)
    logits_TV = module(hidden_TD)
    expected = (F.cross_entropy(logits_TV, targets_T, reduction="none") * weights_T).sum()
    loss = module.cross_entropy(hidden_TD, targets_T, weights_T)
    parameters = (hidden_TD, module.weight)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # float32 sums of 12 tokens

    log_p_TV = (module(hidden_TD) / 0.7).log_softmax(-1)
    logprobs_T, entropy_T = module.token_log_probabilities(hidden_TD, targets_T, 0.7)
    torch.testing.assert_close(logprobs_T, log_p_TV.gather(1, targets_T[:, None])[:, 0])
    torch.testing.assert_close(entropy_T, -(log_p_TV.exp() * log_p_TV).sum(-1))


def test_the_embedding_looks_up_rows():
    """Ids of any shape give rows of the weight."""
    module = Embedding(5, 3)
    with torch.no_grad():
        module.weight.copy_(normal(0, 5, 3))
    tokens_BS = torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(module(tokens_BS), module.weight[tokens_BS])


@pytest.mark.parametrize("mtp", [False, True])
def test_every_use_of_both_matrices_is_a_call_of_their_module(mtp):
    """Forward hooks of the embedding and of the head fire in a forward pass, as a sharding wrapper needs them to."""
    model = tiny_model(0)
    calls = []
    for name in ("model.embed_tokens", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    tokens_BS = torch.zeros(1, 4, dtype=torch.int64)
    out = model.hidden(tokens_BS, mtp=mtp)
    model.lm_head(out.hidden_BSD)
    assert calls == ["model.embed_tokens"] * (2 if mtp else 1) + ["lm_head"]


def test_nothing_outside_the_model_computes_with_a_bare_weight():
    """Only the C decoder, which packs the weights into its own layout, and the choice of it read the head's matrix."""
    pattern = re.compile(r"\b(lm_head|embed_tokens)\.weight\b(?![\"'])")
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
        and path.relative_to(PACKAGE).parts[0] not in ("model", "testing")
    }
    assert users <= {"inference/cpu_decoder.py", "inference/pages.py"}
