"""Small batches and phases for the tests of the model and of the training loop."""

import dataclasses

import torch

from minglm.config import OptimizerConfig
from minglm.data.packing import Batch
from minglm.testing.model import drawn_documents
from minglm.testing.strategies import numbers
from minglm.train.loop import Phase, accumulate


def drawn_batch(seed, B, S, packed):
    """Draw tokens of the tiny vocabulary, a mask with holes, and if packed, documents with padding at the end.

    As in real batches, the first token of a row and of a packed document is no target.
    """
    tokens_BS = torch.randint(0, 24, (B, S), generator=numbers(seed))
    mask_BS = torch.rand(B, S, generator=numbers(seed + 1)) < 0.8
    mask_BS[:, 0] = False
    if not packed:
        return Batch(tokens_BS, mask_BS)
    documents_BS = drawn_documents(seed + 2, B, S)
    at_BS = torch.arange(S).expand(B, S)
    first_BS = torch.nn.functional.pad(
        documents_BS[:, 1:] != documents_BS[:, :-1], (1, 0), value=True
    )
    positions_BS = at_BS - torch.where(first_BS, at_BS, 0).cummax(1).values
    return Batch(tokens_BS, mask_BS & ~first_BS & (documents_BS >= 0), documents_BS, positions_BS)


def constant_phase(**values):
    """Return a phase whose schedules are constants; `values` replace any of them, or a field of its optimizer."""
    standard = {"name": "test", "tokens": 0, "start": 0, "sequence_length": 8}
    schedules = {"learning_rate": 1e-3, "batch_tokens": 16, "mtp_weight": 0.3, "bias_rate": 1e-3}
    chosen = {**standard, **schedules, "balance_weight": 0.0, **values}
    options = {field.name for field in dataclasses.fields(OptimizerConfig)} - schedules.keys()
    optimizer = {name: chosen.pop(name) for name in options & chosen.keys()}
    chosen["optimizer"] = OptimizerConfig(**optimizer)
    return Phase(**{k: (lambda seen, v=v: v) if k in schedules else v for k, v in chosen.items()})


def gradients(model, batch, mtp_weight, **values):
    """Return (losses, {name: gradient, zeros where there is none}, loads) of one batch."""
    model.zero_grad()
    sums = accumulate(model, batch, constant_phase(**values), mtp_weight)._asdict()
    loads = sums.pop("tokens_per_expert_LE")
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }
    return sums, found, loads


def changed(model, **values):
    """Return the model's config with other values."""
    return dataclasses.replace(model.config, **values)
