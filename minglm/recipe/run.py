"""Run the whole recipe, stage by stage, in a folder that a killed run continues from (paper Figure 3, sections 2 to 4).

    data -> general -> code_reasoning -> repository -> reasoning -> long_agent          (one schedule; 2.2 to 2.4)
         -> for each expert: X.sft -> X.rl, and X.control to compare with               (3.1 stage one, 3.2, 3.3)
         -> unified -> general_rl -> pathology_rl                                       (3.1 stage two, 3.4)

A stage reads the final checkpoint of the stage it builds on and writes its own; a complete stage is skipped.
The same command therefore continues a run that was killed, anywhere. The paper does not show the order of the
last stages. It calls general RL the final one and distils experts into the main model, which leaves this
order.

Ranks of torchrun run it together: they share every batch and every rollout (`minglm.parallel`), and rank 0
prepares the data and writes the log.

Simplified: the experts are trained one after the other; in the paper they are trained side by side.
"""

import time
from pathlib import Path

from minglm.common import trackers
from minglm.common.allocator import keep_freed_memory
from minglm.common.device import pick_device, seed_everything
from minglm.common.files import remove, write_json
from minglm.common.log import Log, forget_stage
from minglm.common.threads import use_threads
from minglm.common.version import versions
from minglm.config import RunConfig
from minglm.config.run import to_dict
from minglm.data.build import PreparedData, prepare
from minglm.kernels import dispatch
from minglm.parallel.mesh import build_meshes
from minglm.parallel.world import World
from minglm.recipe.context import RunContext
from minglm.recipe.evaluation import evaluate
from minglm.recipe.folder import check_folder, check_log
from minglm.recipe.preflight import check_order, wanted_stages
from minglm.recipe.solutions import task_data
from minglm.recipe.stages import Stage, is_done, long_row, plan_stages
from minglm.recipe.training import train_stage
from minglm.report.records import (
    DataRecord,
    EndRecord,
    ForgottenRecord,
    StageBeginRecord,
    StageEndRecord,
    StartRecord,
    read_records,
    select,
)
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import moments_of, weights_of


class RecipeRunner:
    """A run in a folder: prepares the data, then trains stages in order.

    Raises ValueError when the folder belongs to another config, when its log has lost records, or when the
    data cannot be prepared. Only one process may run in a folder (`minglm.common.lock`).
    """

    def __init__(
        self,
        run: RunConfig,
        out: str | Path,
        world: World | None = None,
        quiet: bool = False,
        rollout_only: bool = False,
        from_rollouts: Path | None = None,
    ) -> None:
        """Prepare the data, or find it. world: the ranks, all of which must call this; None: one process.

        rollout_only, from_rollouts: for a stage of RL, as in `RunContext`.
        """
        self.run = run
        self.out = Path(out)
        self.world = world or World(pick_device(run.device))
        check_folder(self.out, run)
        dispatch.use(run.kernels)
        seed_everything(run.seed)
        device = self.world.device
        # Threads share a batch in one process. Ranks share it already, so their threads share each operation.
        inside = device.type != "cpu" or run.compile or self.world.has_group
        threads = use_threads(run.threads, inside=inside)
        if device.type == "cpu":
            keep_freed_memory()
        meshes = None
        if self.world.has_group:
            layout = run.parallel.layout(self.world.size, run.model)
            meshes = build_meshes(layout, device.type)
        self.stages = plan_stages(run)

        first = self.world.ranks.first
        position = first(self._clean)
        self.log = self._open_log()
        # What was logged after the last checkpoint will be done, and logged, again.
        first(lambda: self.log.cut(position))
        log = self.log if self.world.is_writer else None
        self.checkpoints = CheckpointStore(self.out, log, run.checkpoint_seconds)

        data = self._prepare()
        if not position:
            start = StartRecord(
                name=run.name, config_hash=run.hash(), seed=run.seed, versions=versions()
            )
            self.log.write(start)
            self.log.write(DataRecord(**data.about))
        self.context = RunContext(
            run=run,
            out=self.out,
            device=device,
            threads=threads,
            log=self.log,
            checkpoints=self.checkpoints,
            tokenizer=data.tokenizer,
            shards=data.train,
            heldout=data.heldout,
            world=self.world,
            meshes=meshes,
            quiet=quiet or not self.world.is_writer,
            rollout_only=rollout_only,
            from_rollouts=from_rollouts,
        )

    def _clean(self) -> int:
        """Remove what a process that was killed left behind. Return the position of the log that counts."""
        position = check_log(self.out)
        self._forget_deleted_stages(self.out / "log.jsonl", position)
        for leftover in list(self.out.rglob(".*.tmp")):
            remove(leftover)  # half a file, or half a checkpoint
        return position

    def _open_log(self) -> Log:
        """Open the log, which the writer alone writes."""
        path = self.out / "log.jsonl"
        if not self.world.is_writer:
            return Log(path, writes=False)
        return Log(path, trackers.writer(self.run.watch, self.out / "watch", to_dict(self.run)))

    def _prepare(self) -> PreparedData:
        """Return the data.

        The writer makes them, while the other ranks wait; then they find what it has made.
        """
        run = self.run
        made = []

        def make() -> None:
            made.append(prepare(run, self.out / "data", task_data(run)))
            values = {"hash": run.hash(), "config": to_dict(run)}
            write_json(self.out / "config.json", values)

        self.world.ranks.first(make)
        return made[0] if made else prepare(run, self.out / "data", task_data(run))

    def _forget_deleted_stages(self, log_path: Path, position: int) -> None:
        """Take the records of each stage whose checkpoint was deleted out of the log: it will be trained again."""
        store = CheckpointStore(self.out)
        for stage in self.stages:
            if not is_done(stage, self.stages, store) and not store.is_interrupted(stage.name):
                forget_stage(
                    log_path,
                    position,
                    stage.name,
                    lambda count, name=stage.name: ForgottenRecord(stage=name, records=count),
                )

    def is_done(self, stage: Stage) -> bool:
        """Return whether a stage need not be trained."""
        return is_done(stage, self.stages, self.checkpoints)

    def execute(self, only: str | None = None, until: str | None = None) -> bool:
        """Run all stages, or one (`only`), or those up to one (`until`).

        Return whether the whole run is complete.

        An interrupted stage comes first, because its log is cut back to its checkpoint. Raises ValueError
        when it is not among those asked for.
        """
        check_order(self.stages, self.checkpoints, only, until)
        wanted = wanted_stages(self.stages, only, until)
        remaining = [stage for stage in self.stages if not self.is_done(stage)]
        interrupted = [s.name for s in remaining if self.checkpoints.is_interrupted(s.name)]
        for stage in sorted(remaining, key=lambda stage: stage.name not in interrupted):
            if stage.name in wanted:
                self.execute_stage(stage)

        complete = all(self.is_done(stage) for stage in self.stages)
        if complete and self.world.is_writer:
            self.log.write(EndRecord(seconds=round(self.seconds_spent(), 1)))
        return complete

    def roll_out(self, name: str) -> Path:
        """Write the rollouts of a stage of RL, by the weights that it would start from. Return the file."""
        stage = next(stage for stage in self.stages if stage.name == name)
        train_stage(self.context, stage, self.context.load_model(stage.base))
        return self.out / "rollouts" / f"{name}.jsonl"

    def execute_stage(self, stage: Stage) -> None:
        """Train one stage from the weights of its base, evaluate it, and mark it complete."""
        began = time.time()
        model = self.context.load_model(stage.base)
        if not self.checkpoints.is_interrupted(stage.name):  # a resumed stage has logged it already
            begin = StageBeginRecord(
                stage=stage.name,
                teaches=stage.teaches,
                tokens=stage.tokens,
                sequence_length=stage.sequence_length,
                learning_rate=stage.learning_rate,
                note=long_row(stage),
            )
            self.log.write(begin)
        trained = train_stage(self.context, stage, model)
        seconds = time.time() - began
        evaluate(self.context, stage, model)
        end = StageEndRecord(
            stage=stage.name,
            tokens=trained.tokens,
            seconds=round(seconds, 1),
            evaluation_seconds=round(time.time() - began - seconds, 1),
        )
        self.log.write(end)
        tensors = weights_of(model)
        if trained.optimizer is not None:
            tensors |= moments_of(model, trained.optimizer)
        self.checkpoints.save(stage.name, tensors, {"tokens": trained.tokens})

    def seconds_spent(self) -> float:
        """Return the seconds of data preparation, training and evaluation in the log."""
        records = read_records(self.log.path)
        seconds = 0.0
        for data in select(records, DataRecord):
            seconds += data.seconds
        for end in select(records, StageEndRecord):
            seconds += end.seconds + end.evaluation_seconds
        return seconds
