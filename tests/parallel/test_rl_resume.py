"""Reinforcement learning on ranks, one of which is killed: started again it continues, and ends with the same numbers."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from helpers.nano_run import CONFIG, OVERRIDES, records, weights
from helpers.world import run_ranks

from minglm.config import load_config
from minglm.model.glm import GLM
from minglm.parallel.world import World
from minglm.recipe.run import RecipeRunner
from minglm.rl import loop
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of

STAGE = "reasoning.rl"
STEPS = 3
WORDS = [*OVERRIDES, "--posttraining.reasoning.rl.steps", str(STEPS), "--parallel.ep", "2"]
WORDS += ["--checkpoint_seconds", "0.001", "--threads", "1", "--data.corpus_megabytes", "0.02"]
WORDS += ["--data.synthetic_documents", "4", "--data.trajectories", "4"]


def reinforced(out, killed_in_step):
    """Train the stage, or what is left of it; rank 1 ends in the middle of a step. Return from which step it resumed."""
    run = load_config(CONFIG, WORDS)
    runner = RecipeRunner(run, out, World(torch.device("cpu")), quiet=True)
    first = []
    original = loop.reinforce_step

    def reinforce_step(trainer, *arguments):
        first.append(trainer.state.step)
        if trainer.state.step + 1 == killed_in_step and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer, *arguments)

    loop.reinforce_step = reinforce_step
    runner.execute(only=STAGE)
    return first[0]


@pytest.mark.slow
def test_a_rank_killed_in_reinforcement_learning_changes_nothing(tmp_path):
    """The same records of all steps, rollouts included, and the same weights to the bit as without the kill."""
    for name in ("killed", "whole"):
        model = GLM(load_config(CONFIG, WORDS).model, seed=1)
        CheckpointStore(tmp_path / name).save("reasoning.sft", weights_of(model), {"tokens": 0})
    with pytest.raises(AssertionError, match=r"rank 1 died|Connection"):
        run_ranks(reinforced, 2, tmp_path / "killed", STEPS)
    resumed = run_ranks(reinforced, 2, tmp_path / "killed", 0)
    assert resumed[0] == resumed[1] > 0
    run_ranks(reinforced, 2, tmp_path / "whole", 0)
    found = [records(tmp_path / name, "rl") for name in ("killed", "whole")]
    assert found[0] == found[1] and [record["step"] for record in found[0]] == [1, 2, 3]
    ours, theirs = (weights(tmp_path / name, STAGE) for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
