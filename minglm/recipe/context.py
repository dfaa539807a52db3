"""Hold what every stage of a run shares: device, log, checkpoints, tokenizer and shards (no section in the paper)."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from minglm.common.device import free_bytes, pick_dtype
from minglm.common.log import Log
from minglm.config import RolloutPrecision, RunConfig
from minglm.data.store.shards import Shard
from minglm.data.tokenizer import Tokenizer
from minglm.envs import Environments
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator, Generator
from minglm.inference.remote import RemoteGenerator
from minglm.model.glm import GLM
from minglm.parallel import Workers, parallelize
from minglm.parallel.copies import whole_copy, without_stages
from minglm.parallel.mesh import Meshes, build_meshes
from minglm.parallel.pipeline import PipelineGLM, own_model
from minglm.parallel.reading import Reader, reading
from minglm.parallel.shard import materialize, shard
from minglm.parallel.workers import ShardedWorker
from minglm.parallel.world import World
from minglm.plan.counts import count_parameters
from minglm.plan.layout import without_pipeline
from minglm.plan.memory import GIB, compute_bytes
from minglm.recipe.inputs import environments_of
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
    rollout_only: bool = False
    """Whether a stage of RL only writes its rollouts, and trains nothing."""
    from_rollouts: Path | None = None
    """A file of samples that a stage of RL trains on, in place of rolling out."""

    @cached_property
    def environments(self) -> Environments:
        """Every environment as post-training has it: it asks and shows the difficulties that the run names."""
        return environments_of(self.run)

    def load_model(self, stage: str | None) -> GLM:
        """Return the model as a stage left it, sharded where there are ranks; None: freshly initialised.

        Raises ValueError where the stage is not complete.
        """
        if stage is not None and not self.checkpoints.is_complete(stage):
            path = self.checkpoints.stage(stage).final
            raise ValueError(f"the stage before has not been run: there is no {path}")
        model = own_model(self.run.model, self.meshes)
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

    def workers(self, model: GLM) -> Workers:
        """Return the threads or ranks that share the batches of a model of `load_model`."""
        return parallelize(model, self.threads, self.world, self.meshes)

    def whole(self, model: GLM, rounded: bool = False) -> GLM:
        """Return all weights of a model of `load_model`: itself, or where it is sharded, a gathered copy.

        rounded: only to generate with, in fewer bytes (`minglm.parallel.copies`).
        """
        workers = self.workers(model)
        if not isinstance(workers, ShardedWorker):
            return model
        return whole_copy(workers, model, self.device, rounded)

    def rollout_generator(self, model: GLM, keep_choices: bool = False) -> Generator:
        """Return the generator that answers for RL and for distillation, in the precision of the config.

        keep_choices: whether answers bring the experts of their tokens.
        """
        if self.run.rollout_engine:
            return self.remote_generator(model)
        # Float8 is made of the weights themselves, as in one process.
        rounded = self.run.rollouts == RolloutPrecision.MODEL
        engine = Engine(
            self.whole(model, rounded),
            self.tokenizer,
            experts=self.run.rollouts,
            draft_tokens=self.run.draft_tokens,
            keep_choices=keep_choices,
        )
        return EngineGenerator(engine)

    def evaluation_generator(self, model: GLM) -> Generator:
        """Return the generator that answers for evaluation: with the model's own precision, or the engine of the rollouts."""
        if self.run.rollout_engine:
            return self.remote_generator(model)
        copy = self.whole(model, rounded=True)
        return EngineGenerator(Engine(copy, self.tokenizer, draft_tokens=self.run.draft_tokens))

    def why_no_copy(self) -> str | None:
        """Say why no rank can gather a copy of the weights to generate with; None where it can, and where none is needed."""
        if self.meshes is None or self.run.rollout_engine:
            return None
        needed = compute_bytes(self.run) * count_parameters(self.run.model)["total_with_mtp"]
        free = free_bytes(self.device)
        if not self.world.agree(int(needed > free)):
            return None
        return (
            f"a copy of the weights to generate with needs {needed / GIB:,.0f} GiB of each rank, and {free / GIB:,.0f} are "
            "free; name an engine with --rollout_engine"
        )

    def remote_generator(self, model: GLM) -> RemoteGenerator:
        """Return the engine over HTTP, which has got the weights of a model: no rank holds all of them."""
        url, folder = self.run.rollout_engine, self.out / "rollout_weights"
        weights = self.workers(model).weights()
        dtype = "bfloat16" if model.dtype == torch.bfloat16 else None  # half of the masters' bytes
        return RemoteGenerator(
            url,
            model,
            self.tokenizer,
            folder,
            weights,
            dtype,
            self.world.ranks,
            self.run.rollout_weights,
        )

    @contextlib.contextmanager
    def reading(self, model: GLM) -> Iterator[Reader]:
        """Yield how ranks divide text and read it with a model of `load_model`, which need not fit any of them."""
        workers = self.workers(model)
        if not isinstance(workers, ShardedWorker):
            yield Reader(model, self.world.ranks)
            return
        if isinstance(model, PipelineGLM):
            model = without_stages(workers, model, self.flat_meshes, self.run.parallel, self.device)
        with reading(model, self.world.ranks) as reader:
            yield reader

    @cached_property
    def flat_meshes(self) -> Meshes:
        """The ranks in the layout whose weights are sharded over the ranks of the pipeline too."""
        assert self.meshes is not None
        return build_meshes(without_pipeline(self.run, self.meshes.layout), self.device.type)
