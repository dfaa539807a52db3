"""Load the model of a run's folder or of a released checkpoint, ready to generate (no section in the paper)."""

import json
from pathlib import Path

from minglm.common.device import pick_device, pick_dtype
from minglm.config.run import RunConfig, check, from_dict
from minglm.data.tokenizer import Tokenizer
from minglm.kernels import dispatch
from minglm.model.glm import GLM
from minglm.recipe.stages import plan_stages
from minglm.train.checkpoint import read


def load_run(folder, stage=None):
    """(model, tokenizer, run, stage name) of a run folder or a released checkpoint, ready to generate.

    stage: of a run; None: its last complete one. The run of a released checkpoint has the paper's settings. Raises
    ValueError where there is no model.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"{folder} is not the folder of a run: it has no config.json; give the --out of a run"
        )
    values = json.loads(path.read_text())
    if "model_type" in values:
        return load_released(folder, stage)
    config = check(from_dict(values["config"]))
    done = [
        s.name
        for s in plan_stages(config)
        if (folder / "checkpoints" / s.name / "final.pt").exists()
    ]
    if not done or (stage or done[-1]) not in done:
        raise ValueError(
            f"{folder}: no complete stage{f' {stage}' if stage else ''}; complete: {', '.join(done) or 'none'}"
        )
    stage, model = stage or done[-1], GLM(config.model)
    model.load_state_dict(read(folder / "checkpoints" / stage / "final.pt")["model"])
    model.dtype = pick_dtype(config.dtype, model.lm_head.weight.device)
    dispatch.use(config.kernels)
    if (trained := getattr(config.stages, stage, None)) is not None:
        model.rope_theta = trained.rope_theta
    return model.eval(), Tokenizer.load(folder / "data" / "tokenizer.json"), config, stage


def load_served(folder, stage=None):
    """(model, tokenizer, dialect of its template, stage name) of a run folder or of a released checkpoint."""
    model, tokenizer, _, stage = load_run(folder, stage)
    template = Path(folder) / "chat_template.jinja"
    keeps = template.exists() and "clear_thinking" in template.read_text(
        encoding="utf-8", errors="replace"
    )
    return model, tokenizer, "glm-4.7" if keeps else "glm-4.5", stage


def load_released(folder, stage=None):
    """`load_run` of a released checkpoint, on the GPU where there is one."""
    if stage is not None:
        raise ValueError(f"--stage {stage}: {folder} is a released checkpoint, which has no stages")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = GLM.from_pretrained(folder, device=pick_device())
    return model.eval(), tokenizer, RunConfig(folder.name, model.config), "released"
