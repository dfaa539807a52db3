"""Every config of the ladder loads, and every wrong value is one line that names the field, before anything starts."""

import dataclasses
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig, RunConfig, StageConfig, StagesConfig, load_config
from minglm.config.overrides import override
from minglm.config.posttraining import PostTrainingConfig
from minglm.config.run import from_dict, runtime_fields, to_dict

ROOT = Path(__file__).parent.parent.parent
LADDER = sorted((ROOT / "configs").glob("*.py"))


def small():
    """Return a run of a possible shape, with nothing in it that a file of the ladder decides."""
    model = ModelConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=512
    )
    return RunConfig("small", model).check()


def leaves(config, prefix=""):
    """Yield (dotted name, value) of every single value of a config."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        elif isinstance(value, bool | int | float | str):
            yield prefix + f.name, value


LEAVES = list(leaves(small()))


def refused(words, run=None):
    """Return the message with which a run refuses these words; it must be one line."""
    with pytest.raises(ValueError) as error:
        override(run or small(), words).check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_ladder_is_there():
    """The rungs that the README names exist."""
    assert {"nano", "toy", "air_106b", "glm45_355b"} <= {path.stem for path in LADDER}


@pytest.mark.parametrize("name", ["air_106b", "glm45_355b", "flash_30b"])
def test_released_models_reason_as_the_paper_has_it(name):
    """Two tiers of difficulty, the hard one unsolved by eight answers, and a temperature that follows the reward."""
    rl = load_config(ROOT / "configs" / f"{name}.py").posttraining.reasoning.rl
    assert rl.curriculum.pool
    assert (rl.curriculum.screen, rl.curriculum.search) == (8, 512)
    assert rl.curriculum.extreme_tier == "unsolved"
    assert rl.dynamic_temperature.window
    assert rl.loss.beta == 0


@pytest.mark.parametrize("path", LADDER, ids=lambda path: path.stem)
def test_config_loads_and_takes_overrides(path):
    """Every file of the ladder gives a checked run, which an override changes in one place."""
    run = load_config(path)
    assert run.name
    other = load_config(path, ["--seed", "7"])
    assert dataclasses.replace(run, seed=7) == other


DEEPEP = "--parallel.dispatcher deepep"
WRONG = {
    "--model.hiden_size 3": "unknown option --model.hiden_size; did you mean --model.hidden_size?",
    "--hidden_size 3": "unknown option --hidden_size; did you mean --model.hidden_size?",
    "--model 3": "unknown option --model; it is a section",
    "--stages.general.mixture.prsoe 1": "did you mean --stages.general.mixture.prose?",
    "--model.hidden_size abc": "model.hidden_size = 'abc': must be a whole number",
    "--model.hidden_size": "--model.hidden_size: no value follows; it must be a whole number",
    "--model.use_qk_norm maybe": "model.use_qk_norm = 'maybe': must be True or False",
    "stray": "this word follows no option: stray",
    "--model.hidden_size 64 65": "these words follow no option: 65",
    "--model.num_attention_heads 5": "model.num_attention_heads = 5: must be a multiple of num_key_value_heads = 2",
    "--model.num_experts_per_tok 161": "model.num_experts_per_tok = 161: cannot exceed n_routed_experts = 160",
    "--model.num_experts_per_tok 1": "model.num_experts_per_tok = 1: with norm_topk_prob",
    "--model.num_hidden_layers 0": "model.num_hidden_layers = 0: must be positive",
    "--model.n_group 3": "model.n_group = 3: must divide n_routed_experts = 160",
    "--model.partial_rotary_factor 1.5": "model.partial_rotary_factor = 1.5",
    "--model.num_nextn_predict_layers 2": "model.num_nextn_predict_layers = 2",
    "--stages.repository.packing tight": "stages.repository.packing = 'tight': must be truncate or best_fit",
    "--stages.general.sequence_length 65536": "stages.code_reasoning.sequence_length = 4096: shorter than",
    "--model.max_position_embeddings 4096": "model.max_position_embeddings = 4096: the longest stage",
    "--stages.general.mixture.prose 0 --stages.general.mixture.code 0": "needs at least one source",
    "--stages.general.mixture.prose nan": "stages.general.mixture.prose = nan: must be a finite number",
    "--stages.general.mixture.prose -1": "stages.general.mixture.prose = -1.0: must be a finite number",
    "--posttraining.unified.sequence_length 200000": "posttraining.unified.sequence_length = 200000: must lie between",
    "--evaluation.problems 0": "evaluation.problems = 0: must be positive",
    "--optimizer.muon_momentum 1.5": "optimizer.muon_momentum = 1.5: must lie between 0 and 1",
    "--posttraining.chat.rl.steps -1": "posttraining.chat.rl.steps = -1: must be a finite number, not negative",
    "--optimizer.batch_tokens_start 0": "optimizer.batch_tokens_start = 0",
    "--optimizer.peak_lr nan": "optimizer.peak_lr = nan",
    "--posttraining.chat.rl.asynchronous.workers 1": "posttraining.chat.rl.asynchronous.max_staleness = 1: older weights draw tokens, which loss.importance_cap must correct",
    "--posttraining.chat.rl.asynchronous.transport pigeon": "posttraining.chat.rl.asynchronous.transport = 'pigeon': must be shared_memory, file or broadcast",
    "--posttraining.reasoning.rl.samples 1": "posttraining.reasoning.rl.samples = 1: a group of one has no advantage",
    "--posttraining.reasoning.rl.prompts 1": "posttraining.reasoning.rl.prompts = 1: an update needs two groups with a signal",
    "--posttraining.reasoning.rl.max_turns 101": "posttraining.reasoning.rl.max_turns = 101: must lie between 0 and 100",
    "--posttraining.general_rl.max_new_tokens 131073": "posttraining.general_rl.max_new_tokens = 131073: must be at most model.max_position_embeddings = 131072",
    "--evaluation.max_new_tokens 200000": "evaluation.max_new_tokens = 200000: must be at most model.max_position_embeddings",
    "--posttraining.general_rl.loss.aggregation sum": "posttraining.general_rl.loss.aggregation = 'sum': must be token, sequence, prompt or constant",
    "--posttraining.general_rl.loss.delta 1.2": "posttraining.general_rl.loss.delta = 1.2: must be above 1 + clip_high = 1.28, or 0",
    "--posttraining.general_rl.loss.delta 2 --posttraining.general_rl.loss.loss_type cispo": "posttraining.general_rl.loss.delta = 2.0: bounds the clipped surrogate",
    "--posttraining.general_rl.dynamic_temperature.window 1": "posttraining.general_rl.dynamic_temperature.window = 1: must be 2 or more, or 0",
    "--posttraining.general_rl.dynamic_temperature.window 5 --posttraining.general_rl.temperature 1.4": "the temperature begins at 1.4, which must lie from lowest = 0.8 to below highest = 1.4",
    "--posttraining.general_rl.dynamic_temperature.window 5 --posttraining.general_rl.dynamic_temperature.spacing 0.001": "dynamic_temperature.spacing = 0.001: a probe would try more than 100 temperatures",
    "--posttraining.general_rl.dynamic_temperature.window 5 --posttraining.general_rl.dynamic_temperature.spacing 0.9": "dynamic_temperature.spacing = 0.9: from lowest = 0.8 to highest = 1.4 it leads to no temperature above the first",
    "--posttraining.chat.rl.curriculum.extreme_lowest 0.3": "posttraining.chat.rl.curriculum.extreme_lowest = 0.3: must not exceed extreme_highest = 0.2",
    "--posttraining.chat.rl.curriculum.search 4": "posttraining.chat.rl.curriculum.search = 4: must be at least screen = 8",
    "--posttraining.chat.rl.curriculum.extreme_tier hard": "posttraining.chat.rl.curriculum.extreme_tier = 'hard': must be rate or unsolved",
    "--posttraining.thinking_share 2": "posttraining.thinking_share = 2.0",
    "--dtype float16": "dtype = 'float16': must be float32 or bfloat16",
    "--watch mlflow": "watch = 'mlflow': must be empty, tensorboard or wandb",
    "--data.fim_rate 2": "data.fim_rate",
    "--parallel.ep 3": "parallel.ep = 3: must divide model.n_routed_experts = 160; use 4",
    "--parallel.fsdp 4 --parallel.ep 8": "parallel.ep = 8: must divide parallel.fsdp = 4; use 4",
    "--parallel.fsdp 6 --parallel.cp 4": "parallel.cp = 4: must divide parallel.fsdp = 6; use 3",
    "--parallel.pp 0": "parallel.pp = 0: must be positive",
    "--parallel.dispatcher nvshmem": "parallel.dispatcher = 'nvshmem': must be all_to_all or deepep",
    f"{DEEPEP} --parallel.ep 20": "it exchanges among 2, 4, 8, 16, 24, 32, 64, 128, 144, 160 ranks, and parallel.ep = 20; use 16 ranks, or all_to_all",
    f"{DEEPEP} --parallel.ep 1": "and parallel.ep = 1; use 2 ranks, or all_to_all",
    f"{DEEPEP} --parallel.ep 8 --model.hidden_size 5000": "it moves multiples of 256 numbers, and model.hidden_size = 5000; use all_to_all",
    f"{DEEPEP} --parallel.ep 8 --model.hidden_size 256 --dtype float32": "it sums bfloat16 only, and dtype = 'float32'; use bfloat16, or all_to_all",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_is_one_line_with_its_name(words):
    """What is wrong, where, and what to do: in one line."""
    assert WRONG[words] in refused(words.split())


def test_missing_files_and_functions_are_one_line(tmp_path):
    """A path that is no config says where the configs are; a file without the function says what a config is."""
    with pytest.raises(
        ValueError, match=r"no config file at nowhere\.py; the ladder is in configs/"
    ):
        load_config("nowhere.py")
    (tmp_path / "mine.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.py has no function mine\(\)"):
        load_config(tmp_path / "mine.py")
    with pytest.raises(ValueError, match=r"has no function other\(\)"):
        load_config(f"{tmp_path / 'mine.py'}:other")


numbers = st.integers(-5, 200_000) | st.floats() | st.booleans()


@given(st.sampled_from(LEAVES), numbers)
def test_any_value_of_any_field_is_accepted_or_refused_in_one_line(leaf, value):
    """No value, however strange, ends in a traceback."""
    try:
        override(small(), [f"--{leaf[0]}={value}"]).check()
    except ValueError as error:
        assert "\n" not in str(error)
        assert leaf[0].rpartition(".")[2] in str(error)


def another(value, by):
    """Return a value of the same type, which differs."""
    if isinstance(value, StrEnum):
        return next(choice for choice in type(value) if choice != value)
    if isinstance(value, str):
        return f"{value}{by}"
    if isinstance(value, bool):
        return not value
    return value + by


@given(st.sampled_from(LEAVES), st.integers(1, 3))
def test_the_hash_says_whether_two_runs_ask_for_the_same(leaf, by):
    """Equal configs have equal hashes, and any change of a value changes it; where a run is computed does not count."""
    name, value = leaf
    other = another(value, by)
    changed = override(small(), [f"--{name}={other}"])
    assert small().hash() == small().hash()
    assert (changed.hash() == small().hash()) == (name.partition(".")[0] in runtime_fields())


@given(st.sampled_from(LEAVES))
def test_an_override_with_the_value_a_field_has_changes_nothing(leaf):
    """Every field can be written on the command line, hyphens or underscores, and reads back as it was."""
    name, value = leaf
    assert override(small(), [f"--{name}", str(value)] if value != "" else []) == small()
    assert override(small(), [f"--{name.replace('_', '-')}={value}"]) == small()


def test_a_source_of_ones_own_joins_the_mixture():
    """Your own files become a source by one option, and only the stage that names it has it."""
    run = override(small(), ["--stages.general.mixture.user:notes", "0.5"])
    assert run.stages.general.mixture["user:notes"] == 0.5
    assert "user:notes" not in run.stages.repository.mixture
    assert "user:notes" not in StagesConfig().general.mixture


def test_help_documents_every_field(capsys):
    """--help prints every field with its docstring, and ends without an error."""
    with pytest.raises(SystemExit) as stop:
        override(small(), ["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name, _ in LEAVES)


def test_a_config_is_plain_data():
    """A config as dictionaries has every field, so RUN/config.json can be read by anything."""
    values = to_dict(small())
    assert set(values) == {f.name for f in dataclasses.fields(RunConfig)}
    assert set(values["stages"]["general"]) == {f.name for f in dataclasses.fields(StageConfig)}


def test_a_field_that_moved_into_a_section_is_found_there():
    """The config.json of an older run names it in the section around; every other value stays."""
    run = override(small(), ["--posttraining.general_rl.loss.clip_low", "0.1"])
    values = to_dict(run)
    section = values["posttraining"]["general_rl"]
    inside = section.pop("loss")
    older = {name: inside[name] for name in ("clip_low", "clip_high", "aggregation")}
    assert from_dict(values) != run  # without the section its defaults
    section.update(older)
    assert from_dict(values) == run


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 9),
)
def test_asked_difficulties_are_read(levels, first, more, times):
    """Numbers with commas are themselves, two with a dash are the range, x says how often; a name may hold colons."""
    listed = f"gym:chain_sum:{','.join(map(str, levels))}x{times}"
    post = dataclasses.replace(PostTrainingConfig(), asked=(listed, f"code:{first}-{first + more}"))
    assert post.asked_difficulties() == {
        "gym:chain_sum": (*levels[:-1], *levels[-1:] * times),
        "code": tuple(range(first, first + more + 1)),
    }


@pytest.mark.parametrize(
    "wrong", ["arithmetic", "arithmetic:", ":3", "code:2-", "code:a", "code:1,,2", "code:1x"]
)
def test_asked_difficulties_of_another_form_are_refused(wrong):
    """What cannot be read is one line with the form that can."""
    assert "must be ENVIRONMENT:DIFFICULTIES" in refused(["--posttraining.asked", wrong])
