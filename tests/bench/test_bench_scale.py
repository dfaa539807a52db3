"""The script for one GPU, on a CPU at nano's size: every part runs, and what can be known beforehand is right."""

import json
import math
from pathlib import Path

import torch

from minglm.__main__ import main
from minglm.bench.scale import FIRST_FOLLOWER, FOLLOWERS, DrawnText

ROOT = Path(__file__).parent.parent.parent
NANO = str(ROOT / "configs" / "nano.py")


def test_the_whole_script(tmp_path, capsys):
    """The record has all four parts; the loss falls; a checkpoint is written while steps go on."""
    out = tmp_path / "scale.json"
    words = ["bench", "scale", NANO, "--large", NANO, "--smoke", "--steps", "12", "--tokens", "512"]
    assert main([*words, "--optimizer.microbatch_tokens", "256", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["versions"]["commit"] and record["versions"]["device"]
    training = record["training"]
    assert training["loss_of_the_text"] < training["last_loss"] < training["first_loss"]
    assert training["tokens_of_a_step"] == 512 and training["mfu"] > 0
    assert training["peak_bytes"] is None and training["planned_bytes"] > 0
    checkpoint = record["checkpoint"]
    assert checkpoint["steps_meanwhile"] and checkpoint["bytes"] > 100_000
    assert checkpoint["seconds_until_training_goes_on"] < checkpoint["seconds_until_written"]
    layer = record["layer"]
    assert layer["dispatched_seconds"] > 0 and layer["local_seconds"] > 0
    assert record["muon"]["tflops"] > 0 and len(record["muon"]["stacks"]) > 3
    assert "seconds_of_a_step_meanwhile" in capsys.readouterr().out


def test_without_a_gpu_it_says_how_to_try_it(capsys, monkeypatch):
    """One line; nothing is measured by accident on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "scale", NANO]) == 2
    assert "there is none; --smoke runs it on a CPU" in capsys.readouterr().err


def test_drawn_text_has_the_entropy_that_it_says():
    """Each token has as many followers, equally often; a stream that is restored goes on with the same rows."""
    stream = DrawnText(64, 200)
    batch = stream.next(40)
    pairs = torch.stack([batch.tokens_BS[:, :-1], batch.tokens_BS[:, 1:]], 2).flatten(0, 1)
    step_T = (pairs[:, 1] - pairs[:, 0] - FIRST_FOLLOWER) % 64
    assert step_T.unique().tolist() == list(range(FOLLOWERS))
    share_V = step_T.bincount() / len(step_T)
    entropy = -(share_V * share_V.log()).sum()
    assert math.isclose(float(entropy), math.log(FOLLOWERS), abs_tol=0.01)  # 8,000 draws
    other = DrawnText(64, 200)
    other.load_state_dict(stream.state_dict())
    assert torch.equal(other.next(3).tokens_BS, stream.next(3).tokens_BS)
