"""What cannot work is refused before anything is written, in one line; every config of the ladder passes."""

import dataclasses
from pathlib import Path

import pytest

from minglm.__main__ import main
from minglm.config import load_config
from minglm.model.glm import GLM
from minglm.recipe import inputs, preflight
from minglm.recipe.stages import plan_stages
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of

ROOT = Path(__file__).parent.parent.parent
NANO = str(ROOT / "configs" / "nano.py")
LADDER = [
    *(str(path) for path in sorted((ROOT / "configs").glob("*.py"))),
    *(f"{ROOT / 'configs' / 'glm45_355b.py'}:{variant}" for variant in ("glm46", "glm47")),
]


@pytest.mark.parametrize("config", LADDER, ids=lambda config: Path(config).name)
def test_every_config_of_the_ladder_passes_its_dry_run(config, capsys, tmp_path, monkeypatch):
    """Sources, environments, lengths and kernels; the disk is reported. Nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", config, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "pathology_rl" in printed
    assert printed.splitlines()[-1].startswith("checkpoints: ")
    assert not list(tmp_path.iterdir())


MISTAKES = {
    "a source of nobody": (
        ["--stages.general.mixture.user:mail", "1"],
        "stages.general.mixture names the source 'user:mail', but there are no data.files",
    ),
    "a file": (
        ["--data.files", "nowhere.txt"],
        "data.files: there is no file or folder nowhere.txt",
    ),
    "a checkout": (
        ["--data.files", "git:nowhere"],
        "data.files: there is no file or folder nowhere",
    ),
    "a tokenizer": (
        ["--data.tokenizer", "none.json"],
        "data.tokenizer = 'none.json': there is no such file",
    ),
    "labels": (["--data.web_labels", "none.jsonl"], "data.web_labels = 'none.jsonl'"),
    "vocabulary": (
        ["--model.vocab_size", "200"],
        "model.vocab_size = 200: 256 bytes and 36 special tokens",
    ),
    "an answer": (
        ["--evaluation.max_new_tokens", "4096"],
        "evaluation.max_new_tokens = 4096: must be at most model.max_position_embeddings = 2048",
    ),
    "kernels": (["--kernels", "triton", "--device", "cpu"], "kernels = 'triton' needs a GPU"),
    "a stage": (["--only", "sleeping"], "--only sleeping: no such stage; the stages are general, "),
    "a difficulty of 10^9": (
        ["--posttraining.asked", "arithmetic:1-999999999"],
        "posttraining.asked = arithmetic:1-999999999: must be ENVIRONMENT:DIFFICULTIES",
    ),
    "difficulties downwards": (["--posttraining.asked", "arithmetic:6-3"], "posttraining.asked = "),
    "difficulties of nothing": (
        ["--posttraining.shown", "arithmetic:6x0"],
        "posttraining.shown = ",
    ),
    "difficulties twice": (
        ["--posttraining.asked", "arithmetic:6", "arithmetic:3"],
        "posttraining.asked names arithmetic twice",
    ),
    "a temperature of nearly nothing": (
        ["--posttraining.reasoning.rl.temperature", "1e-300"],
        "posttraining.reasoning.rl.temperature = 1e-300: logits divided by less than 0.001",
    ),
    "a temperature of evaluation": (
        ["--evaluation.temperature", "1e-9"],
        "evaluation.temperature = 1e-09: logits divided by less than 0.001",
    ),
    "an engine": (
        ["--rollout_engine", "localhost:8000"],
        "rollout_engine = localhost:8000: must be",
    ),
    "an engine's port": (["--rollout_engine", "http://localhost:99999"], "must be an address"),
    "an engine's host": (["--rollout_engine", "http://"], "must be an address"),
    "an engine in brackets": (["--rollout_engine", "http://[::1"], "must be an address"),
    "an engine's second model": (
        [
            *("--rollout_engine", "http://localhost:8000"),
            *("--posttraining.chat.rl.reward.critic", "1"),
            *("--posttraining.chat.rl.reward.judge", "model"),
        ],
        "posttraining.chat.rl.reward.judge = 'model': an engine over HTTP has one model",
    ),
    "a command's quotes": (
        ["--posttraining.agent.rl.outside.command", "'agent"],
        "posttraining.agent.rl.outside.command = 'agent: No closing quotation",
    ),
    "a command's program": (
        ["--posttraining.agent.rl.outside.command", "no-such-program"],
        "there is no program 'no-such-program'",
    ),
    "a command of blanks": (
        ["--posttraining.agent.rl.outside.command", " "],
        "there is no program ''",
    ),
    "an environment": (
        ["--posttraining.chat.environments", "chess"],
        "posttraining.chat.environments: chess: must be some of arithmetic",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dry", [True, False])
def test_a_mistake_is_refused_before_anything_is_written(
    mistake, dry, capsys, tmp_path, monkeypatch
):
    """One line, exit status 2, and an empty folder; with and without --dry-run."""
    words, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["run", NANO, *words, *(["--dry-run"] if dry else [])]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mistake", ["a source of nobody", "an environment"])
def test_a_plan_is_refused_as_the_run_is(mistake, capsys):
    """Names that no run knows: the same line, and no plan. The files of a run may lie where it will be started."""
    words, message = MISTAKES[mistake]
    assert main(["run", NANO, *words, "--dry-run"]) == 2
    refused = capsys.readouterr()
    assert main(["plan", NANO, *words]) == 2
    assert capsys.readouterr() == refused and message in refused.err


def with_source(source):
    """Return nano with one more source in the mixture of its first stage."""
    run = load_config(NANO)
    general = dataclasses.replace(run.stages.general, mixture={"prose": 1.0, source: 1.0})
    return dataclasses.replace(run, stages=dataclasses.replace(run.stages, general=general))


@pytest.mark.parametrize("source", ["reasoning", "tasks:chess", "tasks", "Prose"])
def test_a_source_that_cannot_be_is_named_with_those_that_can(source):
    """The stage, the source, and all sources."""
    with pytest.raises(
        ValueError, match=rf"stages\.general\.mixture names the source '{source}'; there are code"
    ):
        inputs.check_sources(with_source(source))


@pytest.mark.parametrize("source", [*inputs.BUILT_IN_SOURCES, "tasks:retail", "tasks:provocation"])
def test_every_source_of_the_corpus_and_the_environments_is_accepted(source):
    """Also those that this rung does not use."""
    inputs.check_sources(with_source(source))


def test_a_source_of_ones_own_needs_files(tmp_path):
    """user:NAME is accepted with data.files: which names they hold is known when they are read."""
    run = with_source("user:mail")
    data = dataclasses.replace(run.data, files=(str(tmp_path),))
    inputs.check_sources(dataclasses.replace(run, data=data))


def test_the_built_in_sources_are_those_that_the_corpus_makes(tmp_path):
    """The list in the preflight agrees with what a corpus of nano holds."""
    from minglm.data.sources import corpus
    from minglm.data.sources.files import Skipped

    run = load_config(NANO, ["--data.corpus_megabytes", "0.2", "--data.synthetic_documents", "40"])
    documents = corpus.documents(run.data, run.seed, Skipped(tmp_path / "skipped.log"))
    assert {document.source for document in documents} == set(inputs.BUILT_IN_SOURCES)


def test_the_disk_must_hold_the_checkpoints_that_are_missing(tmp_path):
    """Weights of every stage, the optimizer of the first five, two partial checkpoints; nothing for complete stages."""
    run = load_config(NANO)
    stages = plan_stages(run)
    need = preflight.disk_need(run, stages, tmp_path / "run")
    weights = 4 * preflight.count_parameters(run.model)["total_with_mtp"]
    assert len(stages) * weights < need.needed < (len(stages) + 3 * (5 + 2)) * weights
    assert need.free > 0
    preflight.check_disk(preflight.DiskNeed(need.needed, need.needed), tmp_path)
    with pytest.raises(ValueError, match="not enough; free space or choose another --out"):
        preflight.check_disk(preflight.DiskNeed(need.needed, need.needed - 1), tmp_path)

    store = CheckpointStore(tmp_path / "run")
    store.save("long_agent", {}, {})  # as an import leaves it: the stages before count as done
    imported = preflight.disk_need(run, stages, tmp_path / "run").needed
    assert imported < need.needed - 5 * weights
    for stage in stages:
        store.save(stage.name, {}, {})
    assert preflight.disk_need(run, stages, tmp_path / "run").needed == 0


def test_a_layout_must_suit_the_stages_that_are_left(tmp_path, monkeypatch, capsys):
    """One that reinforcement learning cannot have may follow it: stages that are complete are not looked at."""
    model = GLM(load_config(NANO).model)
    for stage in ("long_agent", "reasoning.sft", "reasoning.rl"):
        CheckpointStore(tmp_path).save(stage, weights_of(model), {"tokens": 0})
    checked = []
    monkeypatch.setattr(
        preflight, "check_layout", lambda run, stages, ranks: checked.extend(s.name for s in stages)
    )
    words = ["run", NANO, "--out", str(tmp_path), "--until", "agent.rl", "--dry-run"]
    assert main(words) == 0
    assert checked == ["reasoning.control", "agent.sft", "agent.rl"]
