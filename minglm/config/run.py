"""The configuration of a run: one tree of dataclasses, from the model's shape to the last reinforcement step.

A config is a Python file (see `configs/`) with a function that returns a `RunConfig`. The ladder from `nano` to the 355B
model is made of the same fields with other numbers. The model's shape, `ModelConfig`, has a
file of its own, `minglm.config.model`. `check` refuses impossible values before anything starts.

Paper: Table 1 (shapes), sections 2.2 to 2.4 (stages and hyper-parameters), 3.1 to 3.4 (post-training).
"""

import dataclasses
import hashlib
import json
import math
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from minglm.config.data import DataConfig
from minglm.config.model import MLA_FIELDS, ModelConfig
from minglm.config.overrides import override
from minglm.config.posttraining import EvaluationConfig, PostTrainingConfig, SFTConfig
from minglm.config.training import BalanceConfig, OptimizerConfig, StagesConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    name: str
    """Name of the run, and of its folder under runs/ unless --out is given."""
    model: ModelConfig
    stages: StagesConfig = field(default_factory=StagesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    posttraining: PostTrainingConfig = field(default_factory=PostTrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    """Seed of every random draw."""
    device: str = "auto"
    """auto: the GPU where there is one; else cpu or cuda."""
    dtype: str = "float32"
    """Precision of the matrix products: float32, or bfloat16 where the device has it. Weights stay float32."""
    rollouts: str = "model"
    """Experts while answers are sampled for RL and distillation: the model's own, or float8 in blocks (paper 3.5)."""
    kernels: str = "auto"
    """Form of the kernels: torch, triton, or auto (triton on a GPU, torch on a CPU)."""
    recompute: bool = False
    """Keep only the input of each layer, and compute the layer again in the backward pass: less memory, same result."""
    compile: bool = False
    """torch.compile of each decoder layer; worth its minutes on a GPU, in long runs."""
    threads: int = 0
    """CPU threads, which share the rows of each batch; 0: the cores of this machine divided by the ranks on it."""
    checkpoint_seconds: float = 60.0
    """Seconds of training between checkpoints inside a stage."""
    watch: str = ""
    """tensorboard or wandb: the log's numbers go there too (`pip install 'minglm[log]'`); empty: nowhere else."""

    def hash(self):
        """Twelve hex digits of the config: equal exactly when two runs ask for the same result.

        Where and how comfortably a run is computed does not count: COMFORT.
        """
        values = to_dict(self)
        for name in COMFORT:
            del values[name]
        values["data"] = older(values["data"])
        for section, names in LATER.items():
            kind = type(getattr(self, section))
            for name in names:
                if values[section][name] == getattr(kind, name):
                    del values[section][name]
        for (
            name
        ) in MLA_FIELDS:  # at 0 they say nothing: runs from before they existed keep their hash
            if not values["model"][name]:
                del values["model"][name]
        if self.rollouts == RunConfig.rollouts:
            del values["rollouts"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


COMFORT = ("device", "kernels", "recompute", "compile", "threads", "checkpoint_seconds", "watch")
LATER = {
    "optimizer": ("polynomial", "muon_head_dim", "schedule", "spike_factor", "rollback_after"),
    "evaluation": ("every_tokens", "needles"),
}  # fields that change nothing at their defaults: runs from before they existed keep their hash
CLEANING = (
    "decontaminate",
    "stream_megabytes",
    "near_duplicates",
    "semantic_duplicates",
    "quality",
)
CLEANING += ("web_labels", "lowest_share", "top_share", "top_epochs", "educational")


def older(data):
    """The values of a DataConfig without CLEANING at its defaults: what a run from before those fields was made of."""
    return {
        name: v
        for name, v in data.items()
        if name not in CLEANING or v != getattr(DataConfig, name)
    }


def to_dict(config):
    """A config as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values, kind=RunConfig):
    """The inverse of `to_dict`, from parsed JSON. Raises ValueError for a field that does not exist."""
    types, found = get_type_hints(kind), {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(
                f"{kind.__name__} has no field {name!r}; was this config written by another version?"
            )
        if dataclasses.is_dataclass(types[name]):
            value = from_dict(value, types[name])
        found[name] = tuple(value) if isinstance(value, list) else value
    return kind(**found)


# Fields that end a run with a division by zero, or an endless one, when they are 0; and shares that stay in [0, 1].
POSITIVE = {
    "prompts",
    "problems",
    "max_new_tokens",
    "max_turns",
    "updates_per_rollout",
    "responses_per_prompt",
}
POSITIVE |= {"samples", "batch_tokens", "microbatch_tokens", "top_p", "corpus_megabytes"}
SHARES = {
    "muon_momentum",
    "adam_beta1",
    "adam_beta2",
    "final_lr_ratio",
    "clip_low",
    "top_p",
    "heldout",
    "fim_rate",
}
CHOICES = {
    "kernels": ("auto", "torch", "triton"),
    "dtype": ("float32", "bfloat16"),
    "rollouts": ("model", "float8"),
}
SHARES |= {"thinking_share", "terse_share", "near_duplicates", "semantic_duplicates", "educational"}


def _check_numbers(config, where=""):
    """Every number is finite and not negative; those in POSITIVE are not 0, those in SHARES at most 1."""
    for f in dataclasses.fields(config):
        name, value = where + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            _check_numbers(value, name + ".")
        elif isinstance(value, int | float):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} = {value}: must be a finite number, not negative")
            if value == 0 and f.name in POSITIVE:
                raise ValueError(f"{name} = {value}: must be positive")
            if value > 1 and f.name in SHARES:
                raise ValueError(f"{name} = {value}: must lie between 0 and 1")


def _check_stages(stages):
    previous = 0
    for name, stage in stages.items():
        where = f"stages.{name}"
        if stage.packing not in ("truncate", "best_fit"):
            raise ValueError(f"{where}.packing = {stage.packing!r}: must be truncate or best_fit")
        if stage.sequence_length < 2:
            raise ValueError(
                f"{where}.sequence_length = {stage.sequence_length}: must be at least 2"
            )
        if stage.sequence_length < previous:
            raise ValueError(
                f"{where}.sequence_length = {stage.sequence_length}: shorter than the stage before ({previous})"
            )
        if (
            not all(0 <= w < math.inf for w in stage.mixture.values())
            or sum(stage.mixture.values()) <= 0
        ):
            raise ValueError(
                f"{where}.mixture = {stage.mixture}: needs at least one source with a positive weight"
            )
        previous = stage.sequence_length
    return previous


def _check_phases(post, longest):
    phases = {name: getattr(post, name) for name in ("unified", "general_rl", "pathology_rl")}
    for name, expert in post.experts():
        phases |= {f"{name}.sft": expert.sft, f"{name}.rl": expert.rl}
    for name, phase in phases.items():
        where = f"posttraining.{name}"
        if isinstance(phase, SFTConfig):
            if not 2 <= phase.sequence_length <= longest:
                raise ValueError(
                    f"{where}.sequence_length = {phase.sequence_length}: "
                    f"must lie between 2 and model.max_position_embeddings = {longest}"
                )
            continue
        if phase.aggregation not in ("token", "sequence", "constant"):
            raise ValueError(
                f"{where}.aggregation = {phase.aggregation!r}: must be token, sequence or constant"
            )
        if phase.samples < 2:
            raise ValueError(
                f"{where}.samples = {phase.samples}: a group of one has no advantage; use 2 or more"
            )
        if phase.temperature <= 0:
            raise ValueError(
                f"{where}.temperature = {phase.temperature}: must be positive to explore"
            )


def check(run):
    """Raise ValueError, one line naming field, value and remedy, for a run that cannot work. Returns the run."""
    run.model.check()
    _check_numbers(run)
    longest = _check_stages(run.stages)
    if longest > run.model.max_position_embeddings:
        raise ValueError(
            f"model.max_position_embeddings = {run.model.max_position_embeddings}: "
            f"the longest stage has sequence_length = {longest}"
        )
    last = run.stages.items()[-1][1].rope_theta
    if run.model.rope_theta != last:
        raise ValueError(
            f"model.rope_theta = {run.model.rope_theta}: the last stage trains with rope_theta = {last}"
        )
    _check_phases(run.posttraining, run.model.max_position_embeddings)
    if 0 < run.data.decontaminate < 8:
        raise ValueError(
            f"data.decontaminate = {run.data.decontaminate}: runs of fewer than 8 words stand in innocent text too; "
            "use 8 to 13, or 0 for no search"
        )
    if run.data.lowest_share + run.data.top_share > 1:
        raise ValueError(
            f"data.lowest_share = {run.data.lowest_share} and data.top_share = {run.data.top_share}: "
            "must sum to at most 1"
        )
    if run.data.quality not in ("rubric", "learned") and not Path(run.data.quality).is_file():
        raise ValueError(
            f"data.quality = {run.data.quality!r}: must be rubric, learned or a .jsonl file of marks"
        )
    opt = run.optimizer
    if not 0 < opt.batch_tokens_start <= opt.batch_tokens_end:
        raise ValueError(
            f"optimizer.batch_tokens_start = {opt.batch_tokens_start}: "
            f"must be positive and at most batch_tokens_end = {opt.batch_tokens_end}"
        )
    for name, known in (
        ("polynomial", ("jordan", "polar_express")),
        ("schedule", ("cosine", "wsd")),
    ):
        if getattr(opt, name) not in known:
            raise ValueError(
                f"optimizer.{name} = {getattr(opt, name)!r}: must be {' or '.join(known)}"
            )
    if opt.muon_head_dim not in (0, run.model.head_dim) or (
        opt.muon_head_dim and run.model.kv_lora_rank
    ):
        raise ValueError(
            f"optimizer.muon_head_dim = {opt.muon_head_dim}: must be 0, or model.head_dim = {run.model.head_dim} "
            "of a model without latent attention"
        )
    if 0 < opt.spike_factor <= 1:
        raise ValueError(
            f"optimizer.spike_factor = {opt.spike_factor}: must be above 1, or 0 to leave out only NaN"
        )
    for name, known in CHOICES.items():
        if (value := getattr(run, name)) not in known:
            raise ValueError(f"{name} = {value!r}: must be {', '.join(known[:-1])} or {known[-1]}")
    if run.watch not in ("", "tensorboard", "wandb"):
        raise ValueError(f"watch = {run.watch!r}: must be tensorboard or wandb, or empty")
    return run


def load_config(path, overrides=()):
    """Read a config file and apply overrides.

    path: `configs/toy.py`, or `configs/glm45_355b.py:glm46` for another function of the file.
    overrides: command-line words such as ["--model.hidden_size", "64"].
    Returns a checked `RunConfig`. Raises ValueError, in one line, for a missing file, an unknown field or a bad value.
    """
    file, _, variant = str(path).partition(":")
    if not Path(file).is_file():
        raise ValueError(
            f"no config file at {file}; the ladder is in configs/, for example configs/toy.py"
        )
    variant = variant or Path(file).stem
    functions = runpy.run_path(file)
    if not callable(functions.get(variant)):
        raise ValueError(
            f"{file} has no function {variant}(); a config is a function that returns a minglm.config.run.RunConfig"
        )
    run = functions[variant]()
    return check(override(run, overrides) if overrides else run)
