"""Load the model of a run's folder or of a released checkpoint, ready to generate (no section in the paper)."""

from pathlib import Path
from typing import NamedTuple

from minglm.common.device import pick_device, pick_dtype
from minglm.common.files import read_object
from minglm.config import RunConfig
from minglm.data.tokenizer import Tokenizer
from minglm.kernels import dispatch
from minglm.model.glm import GLM
from minglm.model.hf.config import from_hf
from minglm.model.hf.files import read_config
from minglm.recipe.folder import stored_run
from minglm.recipe.stages import PretrainStage, plan_stages
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of


class LoadedModel(NamedTuple):
    """A model that is ready to generate, with what belongs to it."""

    model: GLM
    tokenizer: Tokenizer
    config: RunConfig
    """Of a released checkpoint: the paper's settings."""
    stage: str
    """The stage that trained the weights; "released" for a released checkpoint."""
    from_hf: bool
    """True for a released checkpoint, False for a run of minglm."""
    environments: tuple[str, ...] = ()
    """Those that the stage was to learn; empty for a released checkpoint."""


class ServedModel(NamedTuple):
    """A model that is ready to chat."""

    model: GLM
    tokenizer: Tokenizer
    dialect: str
    """The chat template: glm-4.5 or glm-4.7."""
    stage: str
    from_hf: bool
    environments: tuple[str, ...] = ()


def load_run(folder: str | Path, stage: str | None = None, device: str = "auto") -> LoadedModel:
    """Load a run's folder or a released checkpoint, ready to generate.

    stage: of a run; None: its last complete one. device: as in `pick_device`, whatever the run was trained
    on. Raises ValueError where there is no model, or no such device.
    """
    folder = Path(folder)
    if is_released(folder):
        return load_hf(folder, stage, device)
    chosen = choose_stage(folder, stage)
    config = chosen.run
    model = GLM(config.model).to(pick_device(device))
    CheckpointStore(folder).restore(chosen.name, weights_of(model))
    model.dtype = pick_dtype(config.dtype, model.device)
    model.rope_theta = chosen.rope_theta
    dispatch.use(config.kernels)
    tokenizer = Tokenizer.load(folder / "data" / "tokenizer.json")
    return LoadedModel(model.eval(), tokenizer, config, chosen.name, False, chosen.environments)


def is_released(folder: Path) -> bool:
    """Return True for the folder of a released checkpoint, False for that of a run.

    Raises ValueError for another.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"{folder} is not the folder of a run: it has no config.json; give the --out of a run"
        )
    values = read_object(path)
    if "model_type" in values:  # the config.json of a released checkpoint
        return True
    if not isinstance(values.get("config"), dict):
        raise ValueError(
            f"{path}: neither model_type, of a released checkpoint, nor config, of a run; give the folder of one of them"
        )
    return False


class ChosenStage(NamedTuple):
    """A complete stage of a run."""

    run: RunConfig
    name: str
    rope_theta: float
    """The rotary base that its weights were trained with."""
    environments: tuple[str, ...]
    """Those that it was to learn."""


def choose_stage(folder: Path, stage: str | None) -> ChosenStage:
    """Return a complete stage of a run, the last one without a name.

    Raises ValueError where there is none.
    """
    run = stored_run(folder).config
    stages = {planned.name: planned for planned in plan_stages(run)}
    complete = CheckpointStore(folder).complete(stages)
    if not complete or (stage is not None and stage not in complete):
        missing = f" {stage}" if stage else ""
        raise ValueError(
            f"{folder}: no complete stage{missing}; complete: {', '.join(complete) or 'none'}"
        )
    name = stage or complete[-1]
    planned = stages[name]
    # Stages after pre-training have the model's own rotary base.
    rope_theta = run.model.rope_theta
    if isinstance(planned, PretrainStage):
        rope_theta = planned.config.rope_theta
    return ChosenStage(run, name, rope_theta, planned.evaluation.environments)


def load_served(folder: str | Path, stage: str | None = None, device: str = "auto") -> ServedModel:
    """Load a run's folder or a released checkpoint, as `load_run` does, with the dialect of its chat template."""
    loaded = load_run(folder, stage, device)
    template = Path(folder) / "chat_template.jinja"
    dialect = "glm-4.5"
    if template.exists():
        text = template.read_text(encoding="utf-8", errors="replace")
        if "clear_thinking" in text:  # a variable that the template of 4.7 introduced
            dialect = "glm-4.7"
    return ServedModel(
        loaded.model,
        loaded.tokenizer,
        dialect,
        loaded.stage,
        loaded.from_hf,
        loaded.environments,
    )


def load_hf(folder: Path, stage: str | None = None, device: str = "auto") -> LoadedModel:
    """Load a released checkpoint as `load_run` does."""
    if stage is not None:
        raise ValueError(f"--stage {stage}: {folder} is a released checkpoint, which has no stages")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    rows = from_hf(read_config(folder), str(folder / "config.json")).vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, the model {rows}; fetch the tokenizer again"
        )
    model = GLM.from_pretrained(folder, device=pick_device(device))
    config = RunConfig(folder.name, model.config)
    return LoadedModel(model.eval(), tokenizer, config, "released", from_hf=True)
