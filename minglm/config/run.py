"""The configuration of a run: one tree of dataclasses, from the model's shape to the last RL step (paper Table 1, 2, 3).

A config is a Python file (see `configs/`) with a function that returns a `RunConfig`. The ladder from `nano`
to the 355B model uses the same fields with other numbers. Every option is declared once, with its default,
its bounds and its docstring. `RunConfig.check` refuses impossible values before anything starts.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import runpy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from minglm.common.device import DEVICES
from minglm.common.mistakes import shown
from minglm.common.threads import MOST_THREADS
from minglm.common.trackers import Tracker
from minglm.common.types import types_of
from minglm.config.data import DataConfig
from minglm.config.model import ModelConfig
from minglm.config.options import about, check_fields, mismatch, option
from minglm.config.overrides import override
from minglm.config.parallel import ParallelConfig, TokenExchange
from minglm.config.posttraining import MOST_DRAFTS, EvaluationConfig, PostTrainingConfig
from minglm.config.training import BalanceConfig, OptimizerConfig, StagesConfig


class Precision(StrEnum):
    """Precision of the matrix products. Weights stay float32."""

    FLOAT32 = "float32"
    """Single precision."""
    BFLOAT16 = "bfloat16"
    """Half precision with the range of float32, where the device has it."""


class RolloutPrecision(StrEnum):
    """Precision of the experts while the model samples answers (paper 3.5)."""

    MODEL = "model"
    """That of the model."""
    FLOAT8 = "float8"
    """Float8 in blocks of 128 by 128."""


class WeightTransfer(StrEnum):
    """How new weights reach an engine over HTTP."""

    DISK = "disk"
    """As a checkpoint in a folder that both see."""
    TENSORS = "tensors"
    """Inside requests."""
    BROADCAST = "broadcast"
    """By a broadcast to its GPUs."""


class Kernels(StrEnum):
    """Implementation of the operations."""

    AUTO = "auto"
    """Triton on a GPU; on a CPU PyTorch, and C for generation and Muon where there is a compiler."""
    TORCH = "torch"
    """The eager forms, in PyTorch."""
    TRITON = "triton"
    """The Triton kernels, which need a GPU (or their interpreter, TRITON_INTERPRET=1, which is for tests)."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run."""

    name: str
    """Name of the run, and of its folder under runs/ unless --out is given."""
    model: ModelConfig
    stages: StagesConfig = field(default_factory=StagesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    posttraining: PostTrainingConfig = field(default_factory=PostTrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = option(ParallelConfig(), runtime=True)
    seed: int = option(0, maximum=2**32 - 1)
    """Seed of every random draw."""
    device: str = option("auto", runtime=True)
    """auto: the GPU where there is one; else cpu or cuda."""
    dtype: Precision = Precision.FLOAT32
    """Precision of the matrix products: float32, or bfloat16 where the device has it. Weights stay float32."""
    rollouts: RolloutPrecision = RolloutPrecision.MODEL
    """Experts while answers are sampled for RL and distillation: the model's own, or float8 in blocks (paper 3.5)."""
    rollout_engine: str = ""
    """URL of an engine that answers for RL, distillation and evaluation: vLLM, SGLang, or
    `serve --weights-from` (`minglm/inference/remote.py` says how each is started); empty: the engine of the
    run."""
    rollout_weights: WeightTransfer = option(WeightTransfer.DISK, runtime=True)
    """How rollout_engine gets new weights: from a folder that both see (disk), inside requests (tensors;
    SGLang and minglm), or by a broadcast to its GPUs (broadcast; SGLang and vLLM)."""
    draft_tokens: int = option(0, maximum=MOST_DRAFTS)
    """Tokens that the MTP layer drafts for each pass of the model while it samples answers for RL,
    distillation and evaluation; 0: none. Answers follow the same distribution, and are other draws."""
    kernels: Kernels = option(Kernels.AUTO, runtime=True)
    """Implementation of the operations: torch, triton, or auto (triton on a GPU, torch on a CPU)."""
    recompute: bool = option(False, runtime=True)
    """Keep only the input of each layer and compute the layer again in the backward pass: less memory, same result."""
    compile: bool = option(False, runtime=True)
    """Apply torch.compile to each decoder layer; worth its minutes on a GPU, in long runs."""
    threads: int = option(0, maximum=MOST_THREADS, runtime=True)
    """CPU threads, which share the rows of each batch; 0: the cores of this machine divided by the ranks on it."""
    checkpoint_seconds: float = option(60.0, runtime=True)
    """Seconds of training between checkpoints inside a stage."""
    keep_samples: int = option(1, runtime=True)
    """Write all samples of every so many steps of RL to samples/STAGE.jsonl in the run's folder; 0: of none."""
    watch: Tracker = option(Tracker.NONE, runtime=True)
    """tensorboard or wandb: send the log's numbers there too (`pip install 'minglm[log]'`); empty: nowhere else."""

    def hash(self) -> str:
        """Return twelve hex digits of the config: equal exactly when two runs ask for the same result.

        Runtime fields, which say where and how a run is computed, do not count.
        """
        values = to_dict(self)
        for name in runtime_fields():
            del values[name]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self) -> "RunConfig":
        """Raise ValueError, in one line that names field, value and remedy, for a run that cannot work; return self."""
        check_fields(self)
        self._check_names()
        self.model.check()
        self.model.check_trainable()
        self.stages.check()
        self.data.check()
        self.optimizer.check()
        self.parallel.check(self.model)
        self._check_dispatcher()
        self._check_lengths()
        self._check_rope()
        self._check_muon()
        self.posttraining.check(self.model.max_position_embeddings)
        self._check_exact()
        self._check_mtp()
        self.evaluation.check(self.model.max_position_embeddings)
        return self

    def _check_names(self) -> None:
        if not self.name.strip(" .") or "/" in self.name:
            raise ValueError(
                f"name = {self.name!r}: must be the name of a folder under runs/, without a slash"
            )
        if self.device.partition(":")[0] not in DEVICES:
            raise ValueError(f"device = {self.device!r}: must be auto, cpu or cuda")

    def _check_dispatcher(self) -> None:
        if self.parallel.dispatcher == TokenExchange.DEEPEP and self.dtype != Precision.BFLOAT16:
            raise ValueError(
                f"parallel.dispatcher = 'deepep': it sums bfloat16 only, and dtype = {self.dtype.value!r}; "
                "use bfloat16, or all_to_all"
            )

    def _check_lengths(self) -> None:
        if self.stages.longest > self.model.max_position_embeddings:
            raise ValueError(
                f"model.max_position_embeddings = {self.model.max_position_embeddings}: "
                f"the longest stage has sequence_length = {self.stages.longest}"
            )
        lengths = {f"stages.{name}": stage.sequence_length for name, stage in self.stages.items()}
        for name, sft in self.posttraining.fine_tunings().items():
            lengths[f"posttraining.{name}"] = sft.sequence_length
        for name, length in lengths.items():
            if length % self.parallel.cp:
                raise ValueError(
                    f"{name}.sequence_length = {length}: "
                    f"must be a multiple of parallel.cp = {self.parallel.cp}, the ranks that share each sequence"
                )

    def _check_rope(self) -> None:
        _, last_stage = self.stages.items()[-1]
        if self.model.rope_theta != last_stage.rope_theta:
            raise ValueError(
                f"model.rope_theta = {self.model.rope_theta}: "
                f"the last stage trains with rope_theta = {last_stage.rope_theta}"
            )

    def _check_muon(self) -> None:
        rows = self.optimizer.muon_head_dim
        has_heads = not self.model.kv_lora_rank
        if rows and not (has_heads and rows == self.model.head_dim):
            raise ValueError(
                f"optimizer.muon_head_dim = {rows}: must be 0, or model.head_dim = {self.model.head_dim} "
                "of a model without latent attention"
            )

    def _check_exact(self) -> None:
        phases = self.posttraining.reinforcements().items()
        name = next((name for name, rl in phases if rl.exact), None)
        if name is None:
            return
        wanted = {
            "dtype": (self.dtype, Precision.FLOAT32),
            "rollouts": (self.rollouts, RolloutPrecision.MODEL),
            "kernels": (self.kernels, Kernels.AUTO),
            "model.kv_lora_rank": (self.model.kv_lora_rank, 0),
            "model.n_group": (self.model.n_group, 1),
        }
        for field_name, (value, needed) in wanted.items():
            if value != needed:
                raise ValueError(
                    f"posttraining.{name}.exact needs {field_name} = {needed}, and it is {value}"
                )

    def _check_mtp(self) -> None:
        if self.draft_tokens and not self.model.num_nextn_predict_layers:
            raise ValueError(
                f"draft_tokens = {self.draft_tokens}: "
                "the model has no MTP layer (model.num_nextn_predict_layers = 0); use 0"
            )
        for name, rl in self.posttraining.reinforcements().items():
            if rl.mtp_loss_weight and not self.model.num_nextn_predict_layers:
                raise ValueError(
                    f"posttraining.{name}.mtp_loss_weight = {rl.mtp_loss_weight}: "
                    "the model has no MTP layer (model.num_nextn_predict_layers = 0); use 0"
                )


def runtime_fields() -> list[str]:
    """Return the names of the fields that do not change the result of a run."""
    return [field.name for field in dataclasses.fields(RunConfig) if about(field).runtime]


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Any) -> RunConfig:
    """Build a config from the nested dictionaries of `to_dict`, also after a trip through JSON.

    Raises ValueError, in one line, for a field that does not exist or is missing, and for a value of another type.
    """
    return _build(RunConfig, values, prefix="")


def _build(section: Any, values: Any, prefix: str) -> Any:
    """Build one dataclass of the tree. prefix: its dotted name with a final dot, for the message."""
    if not isinstance(values, dict):
        name = prefix.removesuffix(".") or "the config"
        raise ValueError(
            f"{name} = {shown(values, quoted=True)}: must be a {section.__name__} with its fields"
        )
    types = types_of(section)
    values = _moved(types, values)
    former = {about(field).formerly: field.name for field in dataclasses.fields(section)}
    arguments = {}
    for given, value in values.items():
        name = former.get(given, given)
        if name not in types:
            raise ValueError(
                f"{section.__name__} has no field {shown(given, quoted=True)}; "
                "was this config written by another version?"
            )
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            value = _build(kind, value, f"{prefix}{name}.")
        elif isinstance(kind, type) and issubclass(kind, StrEnum):
            if value not in [str(choice) for choice in kind]:
                raise ValueError(mismatch(f"{prefix}{name}", value, kind))
            value = kind(value)
        elif isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        arguments[name] = value
    for needed in dataclasses.fields(section):
        has_default = (
            needed.default is not dataclasses.MISSING
            or needed.default_factory is not dataclasses.MISSING
        )
        if needed.name not in arguments and not has_default:
            raise ValueError(f"{prefix}{needed.name} is missing; a {section.__name__} needs it")
    return section(**arguments)


def _moved(types: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a section with those that have become fields of a section inside it put there."""
    values = dict(values)
    for name, kind in types.items():
        for inner in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            outside = about(inner).formerly.removeprefix("../")
            if about(inner).formerly.startswith("../") and outside in values:
                value = values.pop(outside)
                values[name] = {inner.name: value, **values.get(name, {})}
    return values


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply overrides, and check the result.

    path: `configs/toy.py`, or `configs/glm45_355b.py:glm46` for another function of the file.
    overrides: command-line words such as ["--model.hidden_size", "64"].
    Raises ValueError, in one line, for a missing file, an unknown field or a bad value.
    """
    file, _, variant = str(path).partition(":")
    if not os.path.isfile(file):  # False too for a path that no system accepts
        raise ValueError(
            f"no config file at {shown(file) or 'an empty path'}; "
            "the ladder is in configs/, for example configs/toy.py"
        )
    run = _run_file(file, variant or Path(file).stem)
    if overrides:
        run = override(run, overrides)
    return run.check()


def _run_file(file: str, variant: str) -> RunConfig:
    """Execute a config file and call its function.

    Whatever its code raises is one line with file and line.
    """
    try:
        function = runpy.run_path(file).get(variant)
        if not callable(function):
            raise _NoConfig(
                f"{file} has no function {shown(variant)}(); "
                "a config is a function that returns a minglm.config.RunConfig"
            )
        config = function()
        if not isinstance(config, RunConfig):
            if inspect.iscoroutine(config):
                config.close()  # or Python would warn that nobody awaits it
            raise _NoConfig(
                f"{file}: {shown(variant)}() returns {shown(config, quoted=True)}; "
                "it must return a minglm.config.RunConfig"
            )
        # Through plain values, so that a config file may write the named values as strings.
        values = to_dict(config)
    except (KeyboardInterrupt, _NoConfig):
        raise
    except BaseException as error:  # SystemExit too: a config decides nothing about this process
        line = _line_of(error, file)
        where = f"{file}, line {line}" if line else file
        reason = str(error) or "no reason given"
        if isinstance(error, SyntaxError):
            reason = error.msg
        raise ValueError(
            f"{where}: {type(error).__name__}: {shown(reason)}; mend the config"
        ) from error
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


class _NoConfig(ValueError):
    """A file that runs, but is no config; its message is for the user."""


def _line_of(error: BaseException, file: str) -> int | None:
    """Return the line of a config file that an error comes from; None where it does not tell."""
    if isinstance(error, SyntaxError):
        return error.lineno
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    return lines[-1] if lines else None
