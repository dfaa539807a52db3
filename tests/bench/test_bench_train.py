"""The training benchmark: both sides compute the same, and what it counts is what runs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from minglm import load_config
from minglm.bench import train
from minglm.bench.options import BenchOptions
from minglm.bench.train import Products, drawn_batch, floor, ratios


def small():
    """Return the nano run with matrices whose widths transformers' grouped products take."""
    run = load_config("configs/nano.py")
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=64))


def test_record_of_a_small_run(monkeypatch):
    """Every layout and side has a positive speed, and the sides' losses agree, or `train` would have raised."""
    monkeypatch.setattr(train, "memory", lambda *_: 1)
    monkeypatch.setattr(
        train.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=InProcess)
    )
    monkeypatch.setattr(train, "LAYOUTS", {"rows": (16, 0), "documents": (32, 5)})
    record = train.train(small(), BenchOptions(repeats=1, train_tokens=64))
    assert len(record["results"]) == 2 * len(train.SIDES)
    assert all(0 < row["optimizer_seconds"] < row["seconds"] for row in record["results"])
    assert all(found["step"] > 0 for found in record["ratios"].values())
    assert len(record["ratios"]) == 4


class InProcess:
    """A pool that calls: the test need not start processes."""

    def __init__(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def apply(self, function, arguments):
        return function(*arguments)


def test_products_are_counted():
    """Each product counts once, also inside a backward pass; other operations do not."""
    x = torch.randn(3, 4)
    w = torch.randn(4, 5, requires_grad=True)
    with Products() as found:
        (torch.addmm(torch.zeros(5), x, w) + 1).sum().backward()
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    assert sum(found.calls.values()) == 3
    assert floor(lambda batch: x @ batch, w.detach(), 1) > 0


def test_bfloat16_is_compared_with_the_faster_form():
    """The ratio in bfloat16 is over the faster of transformers' two forms, in float32 over its only one."""
    monday = [("minglm", "float32", 2), ("transformers", "float32", 3), ("minglm", "bfloat16", 1)]
    monday += [("transformers", "bfloat16", 4), ("transformers", "bfloat16 weights", 2)]
    rows = [
        {
            "layout": layout,
            "side": side,
            "dtype": dtype,
            "seconds": s,
            "median_seconds": s,
            "optimizer_seconds": 0.5,
        }
        | {"memory_bytes": 1}
        for layout in train.LAYOUTS
        for side, dtype, s in monday
    ]
    found = ratios(rows)
    assert {ratio["step"] for name, ratio in found.items() if "float32" in name} == {1.5}
    assert {ratio["step"] for name, ratio in found.items() if "bfloat16" in name} == {2.0}
    assert {ratio["forward_backward"] for name, ratio in found.items() if "bfloat16" in name} == {
        3.0
    }


@pytest.mark.parametrize("seed", range(3))
def test_drawn_documents(seed):
    """Positions count up from 0 in each document, whose first token is no target."""
    batch = drawn_batch(seed, 9, 96, 32, 5)
    new = batch.documents_BS[:, 1:] != batch.documents_BS[:, :-1]
    step = batch.positions_BS[:, 1:] - batch.positions_BS[:, :-1]
    assert (batch.positions_BS[:, 0] == 0).all()
    assert not batch.mask_BS[batch.positions_BS == 0].any()
    assert (batch.positions_BS[:, 1:][new] == 0).all()
    assert (step[~new] == 1).all()
