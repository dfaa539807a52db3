"""Check what a run reads, before anything is planned or started: environments and data (no section in the paper).

    environments  what post-training and its difficulties name exists
    sources       every source of every mixture is built in, drawn from an environment, or can come from data.files
    files         data.files, data.tokenizer and data.web_labels exist; the tokenizer fits the vocabulary

`minglm.recipe.preflight` checks the rest. This part does without PyTorch, so that `plan` answers at once. A plan asks
for the first two: the files of a run may lie on another machine.
"""

from pathlib import Path

from minglm.config import RLConfig, RunConfig
from minglm.data.sources.files import BUILT_IN_SOURCES
from minglm.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minglm.envs import ENVIRONMENTS, Environments
from minglm.envs.base import Environment

TASKS = "tasks:"
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # a token for each byte, and the special ones


def check_data(run: RunConfig) -> None:
    """Raise ValueError, in one line, for sources, files or a tokenizer from which no data can be made."""
    check_environments(run)
    check_sources(run)
    check_files(run)
    check_vocabulary(run)


def check_sources(run: RunConfig) -> None:
    """Refuse a mixture with a source that neither the corpus nor the environments nor data.files can provide."""
    for name, stage in run.stages.items():
        for source in stage.mixture if stage.tokens else ():
            if source.startswith("user:") and not run.data.files:
                raise ValueError(
                    f"stages.{name}.mixture names the source {source!r}, but there are no data.files to read it from"
                )
            if not (source.startswith("user:") or source in BUILT_IN_SOURCES or has_tasks(source)):
                tasks = [TASKS + name for name in ENVIRONMENTS]
                known = ", ".join([*BUILT_IN_SOURCES, *tasks])
                raise ValueError(
                    f"stages.{name}.mixture names the source {source!r}; there are {known}, and user:NAME"
                )


def has_tasks(source: str) -> bool:
    """Return whether a source is the solved tasks of an environment."""
    if not source.startswith(TASKS):
        return False
    try:
        ENVIRONMENTS[source.removeprefix(TASKS)]
    except ValueError:
        return False
    return True


def check_files(run: RunConfig) -> None:
    """Refuse data that is not there. A data set of a hub (hf:NAME) is looked up only when it is read."""
    for given in run.data.files:
        path = given
        if given.startswith("hf:"):
            continue
        if given.startswith("git:"):
            path = given.removeprefix("git:").partition(":")[0]
        if not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError(f"data.files: there is no file or folder {path}")
    for option in ("tokenizer", "web_labels"):
        path = getattr(run.data, option)
        if path and not Path(path).is_file():
            raise ValueError(f"data.{option} = {path!r}: there is no such file")


def check_vocabulary(run: RunConfig) -> None:
    """Refuse a tokenizer with more ids than the model, or a model with too few ids for any tokenizer."""
    size = run.model.vocab_size
    if run.data.tokenizer:
        ids = Tokenizer.load(run.data.tokenizer).vocab_size
        if ids > size:
            raise ValueError(f"model.vocab_size = {size}: the tokenizer has {ids} ids")
    elif size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"model.vocab_size = {size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {SMALLEST_VOCABULARY}"
        )


def check_environments(run: RunConfig) -> None:
    """Raise ValueError for a stage of post-training without tasks, or with tasks that do not exist."""
    try:
        environments_of(run)
    except ValueError as error:
        raise ValueError(f"posttraining.asked or posttraining.shown: {error}") from None
    for name, config in run.posttraining.reinforcements().items():
        try:
            provoking_kinds(run, config)
        except ValueError as error:
            raise ValueError(f"posttraining.{name}.mining.kinds: {error}") from None
    for name, environments in named_environments(run).items():
        field = f"posttraining.{name}.environments"
        if not environments:
            raise ValueError(f"{field} = nothing: must be some of {', '.join(ENVIRONMENTS)}")
        for environment in environments:
            try:
                ENVIRONMENTS[environment]
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None


def environments_of(run: RunConfig) -> Environments:
    """Return every environment as post-training has it: it asks and shows the difficulties that the run names."""
    post = run.posttraining
    return ENVIRONMENTS.asking(post.asked_difficulties(), post.shown_difficulties())


def provoking_kinds(run: RunConfig, config: RLConfig) -> dict[str, Environment]:
    """Return the kinds of prompts that a stage of RL mines, by environment, with the difficulties that it names.

    Raises ValueError for an environment or a difficulty that does not exist.
    """
    difficulties = config.mining.difficulties("mining")
    asking = environments_of(run).asking({k: v for k, v in difficulties.items() if v})
    return {name: asking[name] for name in difficulties}


def named_environments(run: RunConfig) -> dict[str, tuple[str, ...]]:
    """Return the environments of each phase of post-training, {dotted name of the phase: environments}."""
    post = run.posttraining
    named = {name: expert.environments for name, expert in post.experts()}
    return named | {name: config.environments for name, config in post.reinforcements().items()}
