"""GLM-4.5-Air with its widths divided by 32 on four ranks: a released checkpoint comes in, is trained further, and leaves."""

import math
from pathlib import Path

import pytest
import torch
from helpers.released import tensors
from helpers.world import run_ranks

from minglm.chat import render_text
from minglm.common.files import read_jsonl
from minglm.config import load_config
from minglm.data.tokenizer import Tokenizer
from minglm.envs import ENVIRONMENTS
from minglm.model.glm import GLM
from minglm.parallel.world import World
from minglm.recipe.convert import export_checkpoint, import_checkpoint
from minglm.recipe.run import RecipeRunner

AIR = Path(__file__).parent.parent.parent / "configs" / "air_106b.py"
FACTOR = 32
# Queries have 96 heads of 128, keys 8: a head of 32 in place of 8 heads of 128 leaves a 32nd of both.
WIDTHS = {
    "hidden_size": 4096 // FACTOR,
    "intermediate_size": 10944 // FACTOR,
    "moe_intermediate_size": 1408 // FACTOR,
    "num_attention_heads": 12,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
# All 128 experts, of which 8 process each token, in two of the 45 layers that have them.
DEPTH = {"num_hidden_layers": 3, "vocab_size": 1024}
SFT = {"samples": 2, "batch_tokens": 1024, "sequence_length": 512, "peak_lr": 1e-3}
RL = {"steps": 1, "prompts": 2, "samples": 2, "max_new_tokens": 4, "max_turns": 1, "peak_lr": 1e-4}
LITTLE = {
    "threads": 1,
    "data.corpus_megabytes": 0.02,
    "data.synthetic_documents": 4,
    "data.trajectories": 4,
    "optimizer.microbatch_tokens": 512,
    "evaluation.problems": 1,
    "evaluation.samples": 1,
    "evaluation.max_new_tokens": 4,
    "evaluation.provoking_problems": 1,
    "evaluation.heldout_tokens": 500,
    "posttraining.prompts_per_environment": 1,
    "posttraining.responses_per_prompt": 1,
    # A model that answers nothing right has no problem of moderate difficulty.
    "posttraining.reasoning.rl.curriculum.pool": 0,
    "posttraining.pathology_rl.mining.pool": 2,
    "posttraining.pathology_rl.mining.answers": 1,
}
STAGES = ["reasoning.sft", "reasoning.rl", "agent.sft", "agent.rl", "chat.sft", "chat.rl"]
STAGES += ["unified", "general_rl", "pathology_rl"]
LAYOUT = ["--parallel.fsdp", "4", "--parallel.ep", "2"]


def words(folder):
    """Return the command line of the config: its own stages, with few tokens; a tokenizer and a text of the user's."""
    values = dict(LITTLE)
    values |= {f"model.{name}": value for name, value in {**WIDTHS, **DEPTH}.items()}
    values |= {"data.tokenizer": folder / "tokenizer.json", "data.files": folder / "notes.txt"}
    for stage in STAGES:
        few = RL if stage.endswith("rl") else SFT
        values |= {f"posttraining.{stage}.{name}": value for name, value in few.items()}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def release_air(folder):
    """Write what a run needs: a released checkpoint in bfloat16, its tokenizer, and a text."""
    texts = [
        render_text(environment.demonstrate(task), task.tools)
        for environment in ENVIRONMENTS.values()
        for task in environment.tasks(20, seed=1)
    ]
    Tokenizer.train(texts, DEPTH["vocab_size"]).save(folder / "tokenizer.json")
    (folder / "notes.txt").write_text("".join(texts), encoding="utf-8")
    model = GLM(load_config(AIR, words(folder)).model, seed=1)
    model.save_pretrained(folder / "released", "bfloat16", shard_gigabytes=2e-3)


def train_further(folder, out, only, layout):
    """Import, export at once, train the stages of a list, and export again."""
    run = load_config(AIR, [*words(folder), *layout])
    stage = import_checkpoint(run, folder / "released", out)
    runner = RecipeRunner(run, out, World(torch.device("cpu")), quiet=True)
    export_checkpoint(out, folder / f"{out.name}_at_once", stage)
    for name in only:
        assert not runner.execute(only=name) or name == STAGES[-1]
    export_checkpoint(out, folder / f"{out.name}_exported")


def records(out, kind, stage):
    """Return the records of a kind of a stage in the log."""
    found = read_jsonl(out / "log.jsonl")
    return [record for record in found if (record["kind"], record.get("stage")) == (kind, stage)]


@pytest.mark.ci
def test_air_is_trained_further_on_four_ranks(tmp_path):
    """Experts over two ranks, weights over four; every stage of post-training, with the losses of one process.

    What is exported at once is what was released, to the bit; at the end it has the same tensors with other values.
    """
    release_air(tmp_path)
    out = tmp_path / "run"
    run_ranks(train_further, 4, tmp_path, out, STAGES, LAYOUT)

    released = tensors(tmp_path / "released")
    at_once = tensors(tmp_path / "run_at_once")
    trained = tensors(tmp_path / "run_exported")
    assert at_once.keys() == trained.keys() == released.keys()
    for name, tensor in released.items():
        assert torch.equal(at_once[name], tensor), name
        assert trained[name].dtype == tensor.dtype and trained[name].isfinite().all(), name
    experts = [name for name in released if ".experts." in name and "layers.3" not in name]
    assert any(not torch.equal(trained[name], released[name]) for name in experts)
    assert GLM.from_pretrained(tmp_path / "run_exported").config.n_routed_experts == 128

    for stage in STAGES:
        assert len(records(out, "stage_end", stage)) == 1
        assert records(out, "rl" if stage.endswith("rl") else "step", stage), stage
    # One process, the first stage.
    train_further(tmp_path, tmp_path / "one", STAGES[:1], [])
    steps = [records(folder, "step", STAGES[0]) for folder in (out, tmp_path / "one")]
    assert len(steps[0]) == len(steps[1])
    for ours, theirs in zip(*steps):
        assert len(ours["rank_load_max_over_mean"]) == len(theirs["load_max_over_mean"])
        for name in (
            "loss",
            "grad_norm",
        ):  # float32 in another order, or bfloat16 where the CPU has it
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-3), (name, ours, theirs)
