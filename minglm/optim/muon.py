"""Muon for matrices and AdamW for the rest, as one optimizer with one state dict. Paper 2.4.

For a matrix W with gradient g:

    M <- mu M + (1 - mu) g                         momentum, mu = 0.95
    U  = orthogonalize(mu M + (1 - mu) g)          Nesterov; Newton-Schulz, 5 steps (kernels/newton_schulz.py)
    W <- W - lr wd W - lr 0.2 sqrt(max(rows, columns)) U

All singular values of U are near one, so its Frobenius norm is near sqrt(min(rows, columns)) and the RMS of its entries
near 1 / sqrt(max(rows, columns)). The last factor makes that 0.2, about what AdamW's updates have: one learning rate
and one weight decay then serve both kinds, and every shape.

Choices:
- Every matrix gets Muon, the router's and the MTP layer's projection too. An expert stack, (experts, rows, columns),
  is many matrices: each is orthogonalised by itself. A rule "Muon for parameters of exactly two axes" would leave
  about 95% of GLM-4.5 to AdamW without a word.
- q, k, v and gate, up are separate parameters: the polar factor of two matrices joined is not that of each. With
  `muon_head_dim` the heads of q, k and v are separate too, as later models of this family do; the paper does not say.
- AdamW has the embedding, norms and biases (the paper's exceptions) and also the output head, which the paper does not
  name and other implementations leave out (`muon_output_head` moves it). A matrix with one row or one column is a
  vector, and AdamW's too. Parameters with one axis have no weight decay.
- All matrices of one shape go through Newton-Schulz as one stack: a few large products, not hundreds.
- `polynomial` = polar_express takes coefficients that bring singular values nearer to one in as many products.
- State exists from the start, so an expert or a layer without a gradient so far has the same keys in a checkpoint.

The learning rate is set from outside, in every group's "lr", before each step (schedule.py). Simplified: one process;
an optimizer for sharded weights overrides `orthogonalize_all` alone, since only that step needs whole matrices.
"""

import functools
import math
import re
from collections import defaultdict

import torch

from minglm.kernels.newton_schulz.eager import orthogonalize as newton_schulz
from minglm.kernels.newton_schulz.eager import polar_express

ADAM_EPS = 1e-8
HEADS = re.compile(r"\b[qkv]_proj\.weight$")  # matrices whose rows are heads, one after the other
POLYNOMIALS = {"jordan": lambda steps: None, "polar_express": polar_express}


def assign(named_parameters, config):
    """Divide parameters between Muon and AdamW (rules in the module docstring).

    named_parameters: iterable of (name, parameter), names as in `GLM.named_parameters()`; those that need no gradient
    are left out. config: OptimizerConfig. Returns optimizer groups: dictionaries with "kind" ('muon' or 'adamw'),
    (name, parameter) pairs in "params", and settings. Raises ValueError for a parameter with more than three axes.
    """
    muon, heads, decayed, plain = [], [], [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if parameter.ndim > 3:
            raise ValueError(
                f"{name} has {parameter.ndim} axes; Muon knows matrices (2) and stacks of matrices (3)"
            )
        if parameter.ndim < 2:
            plain.append((name, parameter))
        elif _is_muon(name, parameter, config):
            (heads if config.muon_head_dim and HEADS.search(name) else muon).append(
                (name, parameter)
            )
        else:
            decayed.append((name, parameter))
    shared = {"lr": config.peak_lr, "weight_decay": config.weight_decay}
    adam = {"kind": "adamw", "betas": (config.adam_beta1, config.adam_beta2)}
    own = {"kind": "muon", "momentum": config.muon_momentum}
    own |= {"steps": config.newton_schulz_steps, "update_rms": config.update_rms}
    groups = [
        {"params": muon, **shared, **own},
        {"params": heads, **shared, **own, "head_dim": config.muon_head_dim},
        {"params": decayed, **shared, **adam},
        {"params": plain, **shared, **adam, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_muon(name, parameter, config):
    path = name.split(".")
    if "embed_tokens" in path or 1 in parameter.shape[-2:]:
        return False
    is_head = (
        "lm_head" in path or "shared_head" in path
    )  # the second is the MTP layer's, in Hugging Face's names
    return config.muon_output_head or not is_head


def update_scale(shape, update_rms):
    """Factor that brings an orthogonal matrix of this (..., rows, columns) shape to the given RMS; 1 when that is 0."""
    return update_rms * math.sqrt(max(shape[-2:])) if update_rms else 1.0


class Muon(torch.optim.Optimizer):
    """Muon and AdamW over one model (equations in the module docstring).

    parameters: a module, or an iterable of (name, parameter), already on their device.
    config: OptimizerConfig. orthogonalize: (stack, steps) -> stack, where another precision or algorithm is wanted;
    None is Newton-Schulz with the config's polynomial.
    Raises ValueError as `assign` does, and when no parameter needs a gradient.
    """

    def __init__(self, parameters, config, orthogonalize=None):
        named = (
            parameters.named_parameters() if isinstance(parameters, torch.nn.Module) else parameters
        )
        super().__init__(assign(named, config), {"lr": config.peak_lr})
        coefficients = POLYNOMIALS[config.polynomial](config.newton_schulz_steps)
        self.newton_schulz = orthogonalize or functools.partial(
            newton_schulz, coefficients=coefficients
        )
        for group in self.param_groups:
            keys = ("momentum",) if group["kind"] == "muon" else ("first", "second")
            for parameter in group["params"]:
                self.state[parameter] = {key: torch.zeros_like(parameter) for key in keys}
                if group["kind"] == "adamw":
                    self.state[parameter]["step"] = torch.tensor(0.0)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                gradients = [parameter.grad for parameter in parameters]
                states = [self.state[parameter] for parameter in parameters]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                update = self._muon if group["kind"] == "muon" else self._adamw
                update(group, parameters, gradients, states)
        return loss

    def _muon(self, group, parameters, gradients, states):
        momenta = [state["momentum"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        if group.get("head_dim"):
            updates = [update.unflatten(0, (-1, group["head_dim"])) for update in updates]
        for parameter, update in zip(parameters, self.orthogonalize_all(updates, group["steps"])):
            scale = update_scale(update.shape, group["update_rms"])
            parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def orthogonalize_all(self, updates, steps):
        """Orthogonalise matrices and stacks of matrices of any shapes. Returns a list in the same order and shapes."""
        alike = defaultdict(list)
        for index, update in enumerate(updates):
            alike[update.shape[-2:], update.dtype, update.device].append(index)
        results = [None] * len(updates)
        for (shape, _, _), indices in alike.items():
            stacks = [updates[index].reshape(-1, *shape) for index in indices]
            done = self.newton_schulz(torch.cat(stacks), steps).split(
                [len(stack) for stack in stacks]
            )
            for index, stack in zip(indices, done):
                results[index] = stack.reshape(updates[index].shape)
        return results

    def _adamw(self, group, parameters, gradients, states):
        beta1, beta2 = group["betas"]
        first, second = [state["first"] for state in states], [state["second"] for state in states]
        for state in states:
            state["step"] += 1
        steps = [state["step"].item() for state in states]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(scale, ADAM_EPS)
        torch._foreach_addcdiv_(
            parameters, first, scale, [-group["lr"] / (1 - beta1**step) for step in steps]
        )
