"""Hold what every stage of a run shares: device, log, checkpoints, tokenizer and shards (no section in the paper)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from minglm.common.device import pick_dtype
from minglm.common.log import Log
from minglm.config import RunConfig
from minglm.data.store.shards import Shard
from minglm.data.tokenizer import Tokenizer
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.model.glm import GLM
from minglm.parallel import Workers, parallelize
from minglm.parallel.mesh import Meshes
from minglm.parallel.pipeline import GLMStage
from minglm.parallel.shard import materialize, shard
from minglm.parallel.workers import ShardedWorker
from minglm.parallel.world import World
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of


@dataclass(frozen=True)
class RunContext:
    """What every stage of a run shares."""

    run: RunConfig
    out: Path
    """Folder of the run."""
    device: torch.device
    threads: int
    """Threads that share the rows of each batch."""
    log: Log
    checkpoints: CheckpointStore
    tokenizer: Tokenizer
    shards: Mapping[str, Shard]
    """Training documents by source."""
    heldout: Mapping[str, Shard]
    """Held-out documents by source."""
    world: World
    """The ranks of the run."""
    meshes: Meshes | None = None
    """Their layout; None for one process."""
    quiet: bool = False
    """Whether to show no progress bars."""

    def load_model(self, stage: str | None) -> GLM:
        """Return the model as a stage left it, sharded where there are ranks; None: freshly initialised.

        Raises ValueError where the stage is not complete.
        """
        if stage is not None and not self.checkpoints.is_complete(stage):
            path = self.checkpoints.stage(stage).final
            raise ValueError(f"the stage before has not been run: there is no {path}")
        with torch.device("meta"):
            model = self._new_model()
        model.recompute = self.run.recompute
        if self.run.compile:
            model.compile_layers()
        model.dtype = pick_dtype(self.run.dtype, self.device)
        if self.meshes is not None:
            shard(model, self.meshes, self.run.parallel)
        materialize(model, self.device, self.run.seed)
        if stage is not None:
            self.checkpoints.restore(stage, weights_of(model))
        return model

    def _new_model(self) -> GLM:
        """Return the model, or this rank's stage of it."""
        if self.meshes is None or self.meshes.layout.pp == 1:
            return GLM(self.run.model)
        stages = self.meshes.dense["pp"]
        return GLMStage(self.run.model, stages.get_local_rank(), stages.size())

    def workers(self, model: GLM) -> Workers:
        """Return the threads or ranks that share the batches of a model of `load_model`."""
        return parallelize(model, self.threads, self.world, self.meshes)

    def whole(self, model: GLM) -> GLM:
        """Return a model of `load_model` to generate with: itself, or where it is sharded, a gathered copy."""
        workers = self.workers(model)
        if not isinstance(workers, ShardedWorker):
            return model
        with torch.device("meta"):
            copy = GLM(self.run.model)
        copy.to_empty(device=self.device)
        copy.tie_weights()
        copy.dtype = model.dtype
        copy.rope_theta = model.rope_theta
        workers.gather_into(copy)
        return copy

    def rollout_generator(self, model: GLM) -> EngineGenerator:
        """Return the generator that answers for RL and for distillation, in the precision of the config."""
        return EngineGenerator(Engine(self.whole(model), self.tokenizer, experts=self.run.rollouts))
