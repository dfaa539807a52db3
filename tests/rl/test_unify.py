"""One model of several experts: on-policy distillation descends the reverse KL divergence, and a mean is a mean."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import kl_div, log_softmax

from minglm.config import OptimizerConfig
from minglm.envs.base import Task
from minglm.optim.muon import Muon
from minglm.rl.episode import Segment, Trajectory
from minglm.rl.unify import Distiller, average_into, distillation_loss
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

VOCABULARY = 7


def gradients(loss, seed):
    """Return the mean gradient of a loss of one drawn token over all tokens, and that of the divergence: both (V,)."""
    random = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(VOCABULARY, generator=random, dtype=torch.float64, requires_grad=True)
    expert_V = log_softmax(torch.randn(VOCABULARY, generator=random, dtype=torch.float64), 0)
    student_V = log_softmax(logits_V, 0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64)
    for y in range(VOCABULARY):
        chance = student_V[y].detach().exp()
        total = total + chance * loss(student_V[y].view(1, 1), expert_V[y].view(1, 1), mask, 1)
    (mean_V,) = torch.autograd.grad(total, logits_V, retain_graph=True)
    divergence = kl_div(expert_V, student_V, reduction="sum", log_target=True)
    (exact_V,) = torch.autograd.grad(divergence, logits_V)
    return mean_V, exact_V


def with_gradient_of_the_reward(logprobs_BS, expert_logprobs_BS, mask_BS, tokens):
    """Broken: the reward is differentiated too."""
    loss_BS = -(expert_logprobs_BS - logprobs_BS) * logprobs_BS
    return torch.where(mask_BS, loss_BS, 0.0).sum() / tokens


def likelihood(logprobs_BS, expert_logprobs_BS, mask_BS, tokens):
    """Broken: what the student said is made likelier, whatever the expert says."""
    return -torch.where(mask_BS, logprobs_BS, 0.0).sum() / tokens


@given(seed=seeds)
def test_the_mean_gradient_is_that_of_the_reverse_divergence(seed):
    """Over all tokens that the student may draw; float64, so rounding is all that differs."""
    mean_V, exact_V = gradients(distillation_loss, seed)
    torch.testing.assert_close(mean_V, exact_V, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broken", [with_gradient_of_the_reward, likelihood])
def test_the_broken_twin_has_another_gradient(broken):
    """Each shortcut is found."""
    mean_V, exact_V = gradients(broken, 0)
    assert (mean_V - exact_V).abs().max() > 1e-3


def answers(count, seed):
    """Return random answers of five tokens to prompts of three, of two environments in turn."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        tokens = torch.randint(1, 24, (8,), generator=random).tolist()
        segment = Segment(tokens, [False] * 3 + [True] * 5, [0.0] * 8)
        task = Task(str(number), f"env{number % 2}", (), (), None, 1)
        found.append(Trajectory(task, True, segments=[segment]))
    return found


def distiller(student, experts, peak_lr=1e-3):
    """Return the distiller of a student and two experts."""
    options = OptimizerConfig()
    judges = {f"env{number}": expert for number, expert in enumerate(experts)}
    return Distiller(student, Muon(student, options), judges, peak_lr, options.clip_norm, 0)


@settings(max_examples=5)
@given(seed=seeds)
def test_an_expert_judges_the_prompts_of_its_own_environment(seed):
    """Where it is the student itself nothing is learned: one half of the answers has no divergence, the other has."""
    student = tiny_model(seed)
    other = tiny_model(seed + 1)
    trajectories = answers(4, seed)
    same = [t for t in trajectories if t.task.environment == "env0"]
    own = distiller(tiny_model(seed), [student, other]).learn(same, 0)
    # A pass without gradients adds up in another order: float32's rounding.
    assert abs(own.reverse_kl) < 1e-5 and own.grad_norm < 1e-3
    assert (own.tokens, own.segment_tokens) == (10, 16)
    foreign = [t for t in trajectories if t.task.environment == "env1"]
    assert distiller(tiny_model(seed), [student, other]).learn(foreign, 0).grad_norm > 0.01


@settings(max_examples=5)
@given(seed=seeds)
def test_the_mean_of_weights(seed):
    """Of copies it is the copy, whatever the order; of two models every weight is half way, to float32's rounding."""
    one, other = tiny_model(seed), tiny_model(seed + 1)
    found = tiny_model(seed + 2)
    average_into(found, [one, one, one])
    for name, x in found.state_dict().items():
        torch.testing.assert_close(x, one.state_dict()[name], rtol=1e-6, atol=1e-6)
    average_into(found, [one, other])
    for name, x in found.state_dict().items():
        middle = (one.state_dict()[name] + other.state_dict()[name]) / 2
        torch.testing.assert_close(x, middle, rtol=1e-6, atol=1e-6)
