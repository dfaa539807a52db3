"""The whole model with Triton kernels against the whole model with PyTorch's: what the choice in a config does."""

import pytest
import torch

from minglm.inference import Engine, Request
from minglm.kernels import dispatch
from minglm.kernels.cross_entropy import linear_cross_entropy
from minglm.kernels.toolchain.interpreter import switch_on
from minglm.testing.model import tiny_model

DEVICE = switch_on()

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def restore():
    """Restore the usual choice of kernels, of which the process has one."""
    yield
    dispatch.use("auto")


def outputs(kind, qk_norm):
    """Return hidden states of a tiny model and gradients of its losses with one form of the kernels."""
    dispatch.use(kind)
    model = tiny_model(3, use_qk_norm=qk_norm).to(DEVICE)
    tokens_BS = torch.arange(10, device=DEVICE).view(2, 5)
    documents_BS = torch.tensor(
        [[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]], dtype=torch.int32, device=DEVICE
    )
    out = model.hidden(tokens_BS, documents_BS=documents_BS, mtp=True)
    head_VD = model.lm_head.weight
    targets_T = tokens_BS.flatten() + 1
    weights_T = (documents_BS.flatten() >= 0) / 9
    loss = sum(routing.balance_loss for routing in out.routing)
    for hidden_BSD in (out.hidden_BSD, out.mtp_hidden_BSD):
        loss = loss + linear_cross_entropy(hidden_BSD.flatten(0, 1), head_VD, targets_T, weights_T)
    named = dict(model.named_parameters())
    return {"hidden": out.hidden_BSD, **dict(zip(named, torch.autograd.grad(loss, named.values())))}


@pytest.mark.parametrize("qk_norm", [True, False])
def test_both_forms_are_one_model(restore, qk_norm):
    """States and every gradient agree, with packed documents, the MTP layer and the balance loss."""
    exact = outputs("torch", qk_norm)
    for name, found in outputs("triton", qk_norm).items():
        scale = float(exact[name].detach().abs().max()) + 1e-3
        worst = float((found - exact[name]).detach().abs().max()) / scale
        assert worst < 1e-4, (name, worst)  # float32, three layers deep


def test_the_engine_says_the_same(restore):
    """Answers with drafted tokens, one prompt longer than the other: the same tokens, equally likely."""
    requests = [Request([1, 2, 3, 4, 5], 3, temperature=0.0), Request([6, 7], 2, temperature=0.0)]
    answers = {}
    for kind in ("torch", "triton"):
        dispatch.use(kind)
        answers[kind] = Engine(tiny_model(3).to(DEVICE), draft_tokens=1, block=4).generate(requests)
    for exact, found in zip(answers["torch"], answers["triton"]):
        assert found.tokens == exact.tokens
        # float32, three layers deep.
        assert found.logprobs == pytest.approx(exact.logprobs, abs=1e-4)


def test_choice_is_checked(restore, monkeypatch):
    """A wrong name, and Triton where it cannot run, are one line; float64 is computed by PyTorch in any case."""
    with pytest.raises(ValueError, match="auto, torch or triton"):
        dispatch.use("cuda")
    dispatch.use("triton")
    norm = dispatch.Operation.NORM
    with torch.no_grad():
        assert dispatch.selected_name(norm, torch.zeros(1, dtype=torch.float64)) == "eager"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU"):
        dispatch.selected_name(norm, torch.zeros(1))
    monkeypatch.setattr(dispatch, "installed", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        dispatch.use("triton")
