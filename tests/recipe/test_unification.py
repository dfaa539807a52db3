"""Ways to make one model of the experts beside rejection sampling, as a stage of a run."""

import dataclasses
from pathlib import Path

import torch

from minglm.common.log import Log
from minglm.config import Unification, load_config
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM
from minglm.parallel.world import World
from minglm.recipe.context import RunContext
from minglm.recipe.stages import UnifiedStage, plan_stages
from minglm.recipe.training import unify
from minglm.report.records import OnPolicyRecord, read_records, select
from minglm.train.checkpoint import CheckpointStore

ROOT = Path(__file__).parents[2]
TOKENS = 2000


class WithDrawnModels(RunContext):
    """A context whose stages left random weights, others for each stage."""

    def load_model(self, stage):
        """Return the model of a stage."""
        return GLM(self.run.model, sum(map(ord, stage or ""))).eval()


def unified(folder, way):
    """Unify the experts of configs/nano.py in one way. Return the model, the tokens of the stage, and the context."""
    run = load_config(str(ROOT / "configs" / "nano.py"), ["--posttraining.unification", way])
    stage = next(stage for stage in plan_stages(run) if isinstance(stage, UnifiedStage))
    tokenizer = Tokenizer.train([Path(__file__).read_text()], run.model.vocab_size)
    device = torch.device("cpu")
    log = Log(folder / "log.jsonl")
    store = CheckpointStore(folder)
    context = WithDrawnModels(
        run, folder, device, 1, log, store, tokenizer, {}, {}, World(device), quiet=True
    )
    model = context.load_model(stage.base)
    trained = unify(context, dataclasses.replace(stage, tokens=TOKENS), model)
    return model, trained.tokens, stage, context


def test_the_mean_of_the_experts(tmp_path):
    """Every weight is the mean of theirs, to float32's rounding, and no token is trained on."""
    model, tokens, stage, context = unified(tmp_path, Unification.AVERAGE)
    experts = [context.load_model(teacher.stage).state_dict() for teacher in stage.teachers]
    assert tokens == 0
    for name, x in model.state_dict().items():
        mean = sum(expert[name].double() for expert in experts) / len(experts)
        torch.testing.assert_close(x.double(), mean, rtol=0, atol=1e-6)


def test_on_policy_distillation_ends_with_its_tokens(tmp_path):
    """It trains the base, in whole steps, until it has seen the tokens of the stage; every step is in the log."""
    model, tokens, stage, context = unified(tmp_path, Unification.ON_POLICY)
    steps = select(read_records(context.log.path), OnPolicyRecord)
    assert [record.step for record in steps] == list(range(1, len(steps) + 1))
    seen = [0, *(record.tokens for record in steps)]
    assert seen == sorted(seen) and seen[-1] == tokens and seen[-2] < TOKENS <= seen[-1]
    base = context.load_model(stage.base).state_dict()
    assert any(not torch.equal(x, base[name]) for name, x in model.state_dict().items())
