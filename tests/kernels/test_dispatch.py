"""The table of forms: its targets exist, the choice follows its conditions, and the C folder can be deleted."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minglm
from minglm.cli import kernels as verb
from minglm.kernels import dispatch
from minglm.kernels.dispatch import FORMS, REFERENCES, Operation, form_for

CPU = dispatch.Call(torch.device("cpu"), torch.float32, records_gradients=True, inference=False)

PROGRAM = """
import sys
import torch
import minglm
from minglm.config import OptimizerConfig
from minglm.inference import Engine, Request
from minglm.kernels.dispatch import has_c_library
from minglm.optim.muon import Muon
from minglm.testing.model import tiny_model

assert minglm.__file__.startswith(sys.argv[1]), minglm.__file__
assert not has_c_library()
model = tiny_model(1)
(answer,) = Engine(model).generate([Request([1, 2, 3], 4, temperature=0.0)])
print(*answer.tokens)
optimizer = Muon(model, OptimizerConfig())
tokens_BS = torch.arange(8).view(1, 8)
model(tokens_BS).square().mean().backward()
optimizer.step()
print(*(f"{parameter.double().sum().item():.6f}" for parameter in model.parameters()))
"""


@pytest.fixture
def triton_chosen():
    """Choose Triton for the process, and afterwards the usual form."""
    dispatch.use("triton")
    yield
    dispatch.use("auto")


def targets():
    """Return every "module:function" of the table, Triton's only where it is installed."""
    for forms in FORMS.values():
        for form in forms:
            needs_triton = "triton" in form.target or "gluon" in form.target
            if dispatch.installed() or not needs_triton:
                yield form.target
    yield from REFERENCES.values()


@pytest.mark.parametrize("target", sorted(set(targets())))
def test_targets_exist(target):
    """Each form and each reference is a function in a module, or a class."""
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("operation", [o for o in Operation if o != Operation.ATTENTION_FORWARD])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("generates", [True, False])
def test_every_call_has_a_form(operation, dtype, generates):
    """The last form has no conditions, so it serves float64, no rows, wide heads and groups of experts."""
    assert not FORMS[operation][-1].needs
    call = CPU._replace(
        dtype=dtype,
        records_gradients=not generates,
        inference=generates,
        head_dim=512,
        expert_groups=4,
        qk_norm=False,
        empty=True,
        aligned=False,
    )
    assert form_for(operation, call) in FORMS[operation]


def test_the_first_form_whose_conditions_hold_is_chosen(monkeypatch):
    """On a CPU: C while training, fused forms without a compiler, the reference without gradients."""
    generating = CPU._replace(records_gradients=False)
    for c, name in ((True, "c"), (False, "fused")):
        monkeypatch.setattr(dispatch, "has_c_library", lambda c=c: c)
        assert form_for(Operation.NORM, CPU).name == name
    assert form_for(Operation.NORM, generating).name == "eager"
    assert form_for(Operation.QK_NORM_ROPE, CPU._replace(qk_norm=False)).name == "eager"
    assert form_for(Operation.EXPERTS, generating).name == "no gradient"
    assert form_for(Operation.GROUPED_PRODUCT, CPU._replace(aligned=False)).name == "loop"


def test_the_choice_of_the_process_counts_at_once(triton_chosen, monkeypatch):
    """What was chosen before does not outlive `use`; Triton is not asked for float64 or for heads that are too wide."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert form_for(Operation.NORM, CPU).name == "triton"
    assert form_for(Operation.NORM, CPU._replace(dtype=torch.float64)).name == "fused"
    assert form_for(Operation.ATTENTION, CPU._replace(head_dim=300)).name == "chunked"
    x = torch.zeros(1, 1, 1, 8)
    triton = dispatch.select(Operation.ATTENTION, x, head_dim=8)
    dispatch.use("torch")
    assert dispatch.select(Operation.ATTENTION, x, head_dim=8) is not triton


def test_obstacles_say_what_is_missing(monkeypatch):
    """The reasons are those of this machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gluon, _ = FORMS[Operation.ATTENTION_FORWARD]
    assert gluon.obstacle(CPU) == "needs a GPU of compute capability 9.0; this machine has none"
    triton, *_ = FORMS[Operation.ATTENTION]
    assert triton.obstacle(CPU) == "needs a GPU; this machine has none"
    (c, *_) = FORMS[Operation.NEWTON_SCHULZ]
    assert c.obstacle(CPU._replace(dtype=torch.bfloat16)) == "takes float32 only"
    monkeypatch.setattr(dispatch, "has_c_library", lambda: False)
    assert "needs a C compiler" in str(c.obstacle(CPU._replace(matrix_size=16)))


def test_the_verb_prints_every_operation(monkeypatch, capsys):
    """One line of the table for each operation, and a reason for each form that does not run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = verb.argparse.ArgumentParser()
    verb.add_arguments(parser)
    verb.main(parser.parse_args([]))
    printed = capsys.readouterr().out
    for operation in Operation:
        assert f"\n{operation} " in printed and f"\n{operation}\n" in printed
    assert (
        "gluon              needs a GPU of compute capability 9.0; this machine has none" in printed
    )
    assert "runs (training, bfloat16)" in printed


@pytest.mark.ci
def test_everything_runs_without_the_c_folder(tmp_path):
    """A copy of the package without kernels/cpu generates and takes a Muon step, as the package does with PyTorch."""
    copy = tmp_path / "minglm"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(minglm.__file__).parent, copy, ignore=ignored)
    shutil.rmtree(copy / "kernels" / "cpu")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    tokens, sums = run.stdout.splitlines()
    assert len(tokens.split()) == 4 and "nan" not in sums
