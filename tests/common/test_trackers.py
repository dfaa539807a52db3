"""TensorBoard and Weights & Biases receive the numbers that the log holds."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.common.files import read_jsonl
from minglm.common.log import Log
from minglm.common.trackers import Tracker, scalars, writer
from minglm.report.records import SampleRecord, StepRecord

STEP = StepRecord(
    stage="general",
    step=3,
    tokens=96,
    batch_tokens=32,
    tokens_per_second=1000,
    loss=2.5,
    mtp_loss=2.75,
    balance_loss=1.0,
    learning_rate=0.5,
    grad_norm=0.25,
    mtp_weight=0.3,
    load_entropy=[0.9, 0.8],
    left_out="spike",
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3), st.lists, max_leaves=5
)


def test_names_say_stage_kind_and_number():
    """Stage and source come first, then the kind, then the number's own name; labels keep needles of a stage apart."""
    assert scalars("step", STEP.values()) == {
        "general/step/tokens": 96,
        "general/step/batch_tokens": 32,
        "general/step/tokens_per_second": 1000,
        "general/step/loss": 2.5,
        "general/step/mtp_loss": 2.75,
        "general/step/balance_loss": 1.0,
        "general/step/learning_rate": 0.5,
        "general/step/grad_norm": 0.25,
        "general/step/mtp_weight": 0.3,
        "general/step/load_entropy/0": 0.9,
        "general/step/load_entropy/1": 0.8,
    }
    assert scalars(
        "evaluation", {"stage": "sft", "env": "code", "thinking": True, "avg": 0.5, "low": None}
    ) == {"sft/code/True/evaluation/avg": 0.5}
    needles = [
        {"stage": "s", "length": n, "depth": d, "found": 1.0} for n in (8, 9) for d in (0.0, 0.5)
    ]
    assert len({name for record in needles for name in scalars("needle", record)}) == 4


@given(st.dictionaries(st.text(min_size=1, max_size=4), values, max_size=5))
def test_any_record_gives_numbers_only(record):
    """For any JSON in a record, names are strings and values numbers; booleans are not numbers."""
    for name, value in scalars("any", record).items():
        assert isinstance(name, str) and type(value) in (int, float)


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    """TensorBoard's own reader finds every number of the log, at its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(
        tmp_path / "log.jsonl", writer(Tracker.TENSORBOARD, tmp_path / "watch", {"name": "test"})
    )
    for step in range(3):
        log.write(dataclasses.replace(STEP, step=step, loss=2.5 - step))
    log.file.close()
    board = EventAccumulator(str(tmp_path / "watch")).Reload()
    wanted = [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "log.jsonl")]
    assert [(e.step, e.value) for e in board.Scalars("general/step/loss")] == wanted


def test_wandb_is_told_the_same(tmp_path, monkeypatch):
    """A stand-in for the package gets the config once, and each record's numbers with their step."""
    told = []
    run = SimpleNamespace(log=told.append)
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **about: told.append(about) or run)
    )
    log = Log(tmp_path / "log.jsonl", writer(Tracker.WANDB, tmp_path, {"name": "toy"}))
    log.write(STEP)
    log.write(SampleRecord(stage="general", title="a title", text="no number in it"))
    log.file.close()
    assert told[0]["name"] == "toy"
    assert told[1]["step"] == 3
    assert told[1]["general/step/loss"] == 2.5
    assert len(told) == 2 and json.dumps(told)


@pytest.mark.parametrize(
    ("tracker", "module"),
    [(Tracker.TENSORBOARD, "torch.utils.tensorboard"), (Tracker.WANDB, "wandb")],
)
def test_a_missing_package_is_one_line(tracker, module, tmp_path, monkeypatch):
    """A missing package is reported before training, with what to install; without a name nothing is needed."""
    assert writer(Tracker.NONE, tmp_path, {}) is None
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"needs a package: pip install 'minglm\[log\]'"):
        writer(tracker, tmp_path, {"name": "toy"})
