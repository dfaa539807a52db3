"""The whole paper end to end: killed anywhere and continued, it is the same run; what cannot work is one line."""

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import time

import pytest
import torch
from helpers.nano_run import (
    CONFIG,
    OVERRIDES,
    complete,
    copied,
    finished,
    records,
    small,
    start,
    weights,
)

from minglm.__main__ import main
from minglm.common.files import read_jsonl
from minglm.common.log import Log
from minglm.config import load_config
from minglm.envs import ENVIRONMENTS
from minglm.recipe.conversations import (
    experts_answers,
    fitting,
    shown_conversations,
    unified_conversations,
)
from minglm.recipe.run import RecipeRunner
from minglm.recipe.stages import plan_stages
from minglm.recipe.training import fine_tune, provoking_of, train_control
from minglm.report.records import (
    ORACLE,
    ConversationsRecord,
    MiningRecord,
    RLRecord,
    read_records,
    select,
)
from minglm.rl.curriculum import Problem
from minglm.rl.mining import Mined
from minglm.rl.screening import Counted
from minglm.train.checkpoint import CheckpointStore

pytestmark = pytest.mark.slow
__all__ = ["copied", "finished"]  # fixtures

PRETRAINING = ["general", "code_reasoning", "repository", "reasoning", "long_agent"]
EXPERTS = [
    f"{expert}.{phase}"
    for expert in ("reasoning", "agent", "chat")
    for phase in ("sft", "rl", "control")
]
STAGES = [*PRETRAINING, *EXPERTS, "unified", "general_rl", "pathology_rl"]
CONTROLS = {name for name in STAGES if name.endswith("control")}
RL = [name for name in STAGES if name.endswith("rl")]


def test_every_stage_is_in_the_log(finished):
    """The stages in the paper's order, each trained, evaluated and closed; then the claims' evidence."""
    log = records(finished)
    for kind in ("stage_begin", "stage_end"):
        assert [r["stage"] for r in log if r["kind"] == kind] == STAGES
    # RL of this small run has no group with a signal, so its controls learn nothing either.
    assert {r["stage"] for r in log if r["kind"] == "step"} == set(STAGES) - set(RL) - CONTROLS
    assert {r["stage"] for r in log if r["kind"] == "rl"} == set(RL)
    bits = [r["stage"] for r in log if r["kind"] == "bits_per_byte" and r["source"] == "code"]
    assert bits == PRETRAINING
    assert {r["stage"] for r in log if r["kind"] == "mtp_acceptance"} == set(STAGES)
    for kind in ("needle", "bits_by_position"):  # after the stages whose rows are longer
        assert {r["stage"] for r in log if r["kind"] == kind} == {"repository", "long_agent"}
    scored = {(r["stage"], r["env"], r["thinking"]) for r in log if r["kind"] == "evaluation"}
    learned = ("arithmetic", "code", "retail", "instructions")
    for stage in ("unified", "general_rl", "pathology_rl"):
        assert {(stage, env, thinking) for env in learned for thinking in (True, False)} <= scored
    for expert, environments in (
        ("reasoning", learned[:2]),
        ("agent", learned[2:3]),
        ("chat", learned[3:]),
    ):
        for env in environments:
            assert {
                ("long_agent", env, True),
                (f"{expert}.sft", env, True),
                (f"{expert}.rl", env, True),
            } <= scored
        assert (f"{expert}.control", environments[0], True) in scored
    assert [(r["stage"], r["when"]) for r in log if r["kind"] == "pathology"] == [
        ("general_rl", "before"),
        ("pathology_rl", "after"),
    ]
    (mined,) = [r for r in log if r["kind"] == "mining"]
    assert mined["stage"] == "pathology_rl" and set(mined["asked"]) == {
        "provocation",
        "constraints",
    }
    kinds = [r["kind"] for r in log]
    assert kinds[0] == "data"
    assert kinds[-1] == "end"
    assert kinds.count("rejection") == 1
    assert "sample" in kinds


def test_steps_go_on_from_stage_to_stage(finished):
    """Pre- and mid-training is one count of tokens, one schedule and the stages' own lengths."""
    seen = 0
    start_of = {}
    run = small()
    for name in PRETRAINING:
        start_of[name] = sum(getattr(run.stages, earlier).tokens for earlier in start_of)
    for r in (r for r in records(finished, "step") if r["stage"] in PRETRAINING):
        seen = (start_of[r["stage"]] if r["step"] == 1 else seen) + r["batch_tokens"]
        assert r["tokens"] == seen
        assert r["batch_tokens"] % getattr(run.stages, r["stage"]).sequence_length == 0
    losses = [r["loss"] for r in records(finished, "step") if r["stage"] == "general"]
    assert losses[-1] < losses[0] - 0.5, "even this run learns something"


def test_the_report_is_there(finished):
    """report.md, every figure, and at the end of the output the claims and what to do next."""
    report = (finished / "report.md").read_text(encoding="utf-8")
    for heading in ("# Run nano", "## Claims", "## Scores", "## Samples", "## Time"):
        assert heading in report
    drawn = {path.stem for path in (finished / "figures").glob("*.png")}
    assert {"loss", "load", "scores", "rl", "pathology", "time"} <= drawn
    printed = (finished / "printed.txt").read_text(encoding="utf-8")
    assert all(stage in printed for stage in STAGES) and "report:" in printed
    assert f"talk to it: python -m minglm chat {finished}" in printed.splitlines()[-1]


def test_the_folder_is_as_documented(finished):
    """config.json with its hash, the log, a final checkpoint for each stage, and nothing half done."""
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert config["hash"] == small().hash()
    assert config["config"]["name"] == "nano"
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == sorted(STAGES)
    assert {p.name for p in finished.rglob("*") if p.parent.parent.name == "checkpoints"} == {
        "final"
    }
    assert not list(finished.rglob("*.tmp"))


KILLS = [  # in the order of the run: (what the log must hold, how often), and then a moment at random
    ("data", 0),
    ("general", 4),
    ("reasoning.sft", 1),
    ("agent.rl", 1),
    ("rejection", 1),
]


def held(folder, what):
    """Return how often the log has a record of this kind, or a step of this stage."""
    steps = [r for r in read_jsonl(folder / "log.jsonl") if r["kind"] in ("step", "rl")]
    return sum(r["stage"] == what for r in steps) + len(records(folder, what))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return a run that was killed five times and interrupted once, by Ctrl-C, with the error output of the latter."""
    out = tmp_path_factory.mktemp("killed") / "run"
    rng = random.Random(1)
    often = ("--checkpoint_seconds", "0.02")
    for what, count in KILLS:
        process = start(out, *often)
        began = time.monotonic()

        def reached(what=what, count=count, began=began):
            return (out / "data").exists() if what == "data" else held(out, what) >= count

        delay = rng.random() * 0.3

        def later(reached=reached, delay=delay, moment=[]):  # noqa: B006
            if not moment and reached():
                moment.append(time.monotonic() + delay)
            return moment and time.monotonic() >= moment[0]

        status, _ = process.stop(later, signal.SIGKILL)
        assert status == -signal.SIGKILL, f"the run was over before it could be killed at {what}"
    process = start(out, *often)
    # The last kill came before this stage; another one is still to come.
    status, errors = process.stop(lambda: held(out, "general_rl") >= 1, signal.SIGINT)
    assert status == 130, errors
    status, printed, last = complete(out, *often)
    assert status == 0, f"{printed}\n{last}"
    return out, errors


def test_killed_and_continued_is_the_same_run(killed, finished):
    """Every record but the clock's, every step once and in order, and all weights of all stages, bit for bit."""
    out, _ = killed
    mine, straight = (records(folder, "step") for folder in (out, finished))
    for stage in [s for s in STAGES if s not in RL]:
        assert [r["step"] for r in mine if r["stage"] == stage] == list(
            range(1, 1 + sum(r["stage"] == stage for r in straight))
        )
    assert mine == straight
    for stage in STAGES:
        a, b = weights(out, stage), weights(finished, stage)
        assert a.keys() == b.keys(), stage
        assert all(torch.equal(a[name], b[name]) for name in a), stage
    assert records(out) == records(finished)
    assert (out / "report.md").exists()
    assert len(list((out / "figures").glob("*.png"))) >= 6
    assert not list(out.rglob("*.tmp")), "half-written files of killed processes are removed"


def test_a_killed_stage_of_rl_goes_on_where_it_was(killed, finished):
    """After kill -9 in a stage of RL: the same rewards, samples and updates, and a first ratio of one at every step."""
    out, _ = killed
    mine, straight = (records(folder, "rl") for folder in (out, finished))
    assert mine == straight
    learned = [r for r in mine if "gap_worst" in r]
    # An engine with other weights than the trainer's would be off by whole nats.
    assert learned and all(r["gap_worst"] < 1e-3 for r in learned)


def test_ctrl_c_says_how_to_continue(killed):
    """Exit status 130, no traceback, and the command that continues."""
    out, errors = killed
    last = errors.strip().splitlines()[-1]
    assert "saved" in last
    assert f"python -m minglm run {CONFIG} --out {out}" in last
    assert "Traceback" not in errors


def test_a_finished_run_that_is_started_again_changes_nothing(copied, capsys):
    """No stage is trained, and the log and the checkpoints stay as they are, byte for byte."""
    before = {
        p: p.read_bytes() for p in [copied / "log.jsonl", *(copied / "checkpoints").rglob("*.pt")]
    }
    assert main(["run", CONFIG, "--out", str(copied), *OVERRIDES]) == 0
    assert "talk to it" in capsys.readouterr().out
    assert all(path.read_bytes() == data for path, data in before.items())


def one_line(capsys, words, status=2):
    """Return the only line of error output of a command that is refused."""
    assert main([str(word) for word in words]) == status
    errors = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in errors if "it/s" not in line and "B/s" not in line]  # progress bars
    assert len(lines) == 1 and lines[0].startswith("minglm: "), errors
    return lines[0]


@pytest.mark.parametrize(
    "change", [["--seed", "7"], ["--stages.general.tokens", "13000"], ["--name", "other"]]
)
def test_a_folder_of_another_config_is_refused(finished, capsys, change):
    """One line that names the folder and the remedy; what is in the folder stays."""
    before = (finished / "log.jsonl").read_bytes()
    line = one_line(capsys, ["run", CONFIG, "--out", finished, *OVERRIDES, *change])
    assert f"{finished} holds a run of another config" in line and "--out" in line
    assert (finished / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change", [["--threads", "2"], ["--checkpoint_seconds", "5"], ["--device", "cpu"]]
)
def test_how_it_is_computed_is_no_other_config(finished, change):
    """Threads, device and seconds between checkpoints may change from one start to the next."""
    found = json.loads((finished / "config.json").read_text(encoding="utf-8"))["hash"]
    assert load_config(CONFIG, [*OVERRIDES, *change]).hash() == found


BAD_ROWS = {
    '{"text": "torn': "line 1: not JSON",
    '\n\n{"words": 1}\n': 'line 3: needs a string "text"',
    '{"text": 7}\n': 'line 1: needs a string "text"',
    "\n": None,
}


@pytest.mark.parametrize("rows", [rows for rows, wrong in BAD_ROWS.items() if wrong])
def test_an_unreadable_data_file_is_named_with_its_line(tmp_path, capsys, rows):
    """One line with file and line, before anything is trained; the folder is free for the corrected config."""
    bad, out = tmp_path / "mine.jsonl", tmp_path / "run"
    bad.write_text(rows, encoding="utf-8")
    line = one_line(capsys, ["run", CONFIG, "--out", out, *OVERRIDES, "--data.files", bad])
    assert f"nothing in {bad} can be used; {BAD_ROWS[rows]}" in line
    assert not (out / "config.json").exists() and not (out / "checkpoints").exists()


def test_a_missing_data_file_is_named(tmp_path, capsys):
    """The path that does not exist stands in the line."""
    line = one_line(
        capsys,
        ["run", CONFIG, "--out", tmp_path / "run", *OVERRIDES, "--data.files", "/no/such.txt"],
    )
    assert "/no/such.txt" in line


def test_a_source_that_is_not_there_is_refused_before_training(copied):
    """A mixture of a later stage is checked when the data is ready, not when its turn comes."""
    run = small()
    stage = dataclasses.replace(run.stages.long_agent, mixture={"tasks:chess": 1.0})
    run = dataclasses.replace(run, stages=dataclasses.replace(run.stages, long_agent=stage))
    (copied / "config.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"stages.long_agent.mixture names the source 'tasks:chess'; the corpus has",
    ):
        RecipeRunner(run, copied)


def test_a_full_disk_loses_nothing(tmp_path, finished):
    """No room for the first checkpoint: one line, exit status 2; with room again it goes on to the same weights."""
    out = tmp_path / "run"
    largest = 700_000  # bytes of a file: the data fits, a checkpoint with its optimizer does not
    status, _, errors = complete(out, "--until", "general", file_bytes=largest)
    last = errors.replace("\r", "\n").strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in errors, errors
    assert last.startswith("minglm: cannot write") and "free space" in last, last
    assert not list(out.rglob("*.tmp")) and (out / "config.json").exists()
    status, printed, errors = complete(out, "--until", "general")
    assert status == 0, errors
    a, b = weights(out, "general"), weights(finished, "general")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert records(out) == records(finished)[: len(records(out))]
    assert f"continue with: python -m minglm run {CONFIG} --out {out} --stages" in printed
    assert "--until" not in printed


def test_a_full_disk_under_the_log_is_one_line(copied, capsys, monkeypatch):
    """The log cannot grow: one line and exit status 2."""

    def full(self, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minglm.common.log.Log.write", full)
    assert "the disk is full" in one_line(capsys, ["run", CONFIG, "--out", copied, *OVERRIDES])


def unfinish(folder, *stages, partial=()):
    """Take stages back; some of them to a checkpoint that says they were interrupted."""
    for stage in stages:
        path = folder / "checkpoints" / stage / "final"
        if stage in partial:
            log = Log(folder / "log.jsonl")
            CheckpointStore(folder, log).stage(stage).save({}, {})
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("gone", "partial", "only", "until", "expected"),
    [
        (["chat.sft", "chat.rl"], [], None, None, ["chat.sft", "chat.rl"]),
        (["chat.sft", "chat.rl"], [], None, "chat.sft", ["chat.sft"]),
        (["chat.sft", "chat.rl"], [], "chat.rl", None, "the stage before has not been run"),
        (["agent.sft", "chat.sft"], ["chat.sft"], None, None, ["chat.sft", "agent.sft"]),
        (["agent.sft", "chat.sft"], ["chat.sft"], "chat.sft", None, ["chat.sft"]),
        (
            ["agent.sft", "chat.sft"],
            ["chat.sft"],
            "agent.sft",
            None,
            "chat.sft was interrupted; finish it first",
        ),
        (
            ["agent.sft", "chat.sft"],
            ["chat.sft"],
            None,
            "agent.sft",
            "chat.sft was interrupted; finish it first",
        ),
        ([], [], "unified", None, []),
    ],
)
def test_which_stages_are_executed(copied, monkeypatch, gone, partial, only, until, expected):
    """Those asked for that are not complete; an interrupted one first, for its log is cut back to its checkpoint."""
    unfinish(copied, *gone, partial=partial)
    executed = []
    monkeypatch.setattr(
        RecipeRunner, "execute_stage", lambda self, stage: executed.append(stage.name)
    )
    pipeline = RecipeRunner(small(), copied, quiet=True)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            pipeline.execute(only, until)
    else:
        assert pipeline.execute(only, until) == (not gone) and executed == expected


def test_a_stage_needs_the_one_before(copied):
    """One line that names the checkpoint which is not there."""
    unfinish(copied, "agent.sft", "agent.rl")
    with pytest.raises(ValueError, match=r"the stage before has not been run.*agent\.sft"):
        RecipeRunner(small(), copied, quiet=True).execute(only="agent.rl")


@pytest.fixture
def context(copied):
    """Return what the stages of a finished run share."""
    return RecipeRunner(small(), copied, quiet=True).context


def planned(name, run=None):
    """Return the stage of this name in the plan of a run."""
    return next(stage for stage in plan_stages(run or small()) if stage.name == name)


def thoughts(messages):
    """Return the reasoning of every assistant message."""
    return [m.get("reasoning_content") for m in messages if m["role"] == "assistant"]


def test_the_unified_model_learns_both_modes(context):
    """Half of the answers with their thinking and half without it, from every environment of the experts; nothing else."""
    stage = planned("unified")
    answers, counts = experts_answers(context, stage)
    for teacher in stage.teachers:
        for name, prompts in teacher.prompts.items():
            assert counts[f"{teacher.name}, {name}: prompts"] == prompts
            ways = ("kept, different", ORACLE)
            own = sum(counts[f"{teacher.name}, {name}: {way}"] for way in ways)
            assert own == sum(answer.environment == name for answer in answers)
    conversations = unified_conversations(context, stage, answers)
    assert set(conversations) == {"arithmetic", "code", "retail", "instructions"}
    flat = [c for group in conversations.values() for c in group]
    assert abs(sum(thinking for *_, thinking in flat) - len(flat) / 2) <= 1
    for messages, _, thinking in flat:
        assert all(bool(text) == thinking for text in thoughts(messages))


def test_the_cold_start_thinks():
    """Solutions of the oracle to training tasks, as many for each environment as the config says, all with thinking."""
    stage = planned("reasoning.sft")
    environments = [ENVIRONMENTS[name] for name in stage.environments]
    conversations = shown_conversations(environments, stage.config.samples, stage.seed)
    assert {name: len(group) for name, group in conversations.items()} == {
        "arithmetic": 8,
        "code": 8,
    }
    assert all(
        thinking and all(thoughts(messages))
        for g in conversations.values()
        for messages, _, thinking in g
    )


def test_demonstrations_come_in_the_proportions_of_the_names():
    """A name that is repeated brings so many times the conversations."""
    named = [ENVIRONMENTS[name] for name in ("arithmetic", "code", "arithmetic", "arithmetic")]
    conversations = shown_conversations(named, 2, seed=0)
    assert {name: len(group) for name, group in conversations.items()} == {
        "arithmetic": 6,
        "code": 2,
    }


def test_a_control_learns_as_much_as_rl(context, monkeypatch):
    """A control starts where RL starts, is trained on as many tokens, on solutions of the tasks of RL; without any, on
    none; and nothing starts from it.
    """
    phases = []
    monkeypatch.setattr(
        "minglm.recipe.training._run_trainer", lambda *args, **options: phases.append(args[4])
    )
    monkeypatch.setattr("minglm.recipe.training.Muon", lambda *args: None)
    plan = {stage.name: stage for stage in plan_stages(small())}
    control = plan["chat.control"]
    assert control.base == plan["chat.rl"].base
    assert not any(stage.base == control.name for stage in plan.values())

    rewards = select(read_records(context.log.path), RLRecord)[0]
    assert train_control(context, control, None).tokens == 0
    for tokens in (900, None, 2100):
        record = dataclasses.replace(rewards, stage="chat.rl", segment_tokens=tokens)
        context.log.write(record)
    assert train_control(context, control, None).tokens == 3000
    assert [phase.tokens for phase in phases] == [3000]
    record = select(read_records(context.log.path), ConversationsRecord)[-1]
    assert record.stage == control.name
    assert record.examples.keys() == {"instructions", "constraints"}


@pytest.mark.parametrize("name", ["reasoning.control", "agent.control", "chat.control"])
def test_a_control_sees_no_solution_twice(context, monkeypatch, name):
    """However long the solutions are: of those that are drawn it is trained on more than half, and on none a second time."""
    streams = []
    monkeypatch.setattr(
        "minglm.recipe.training._run_trainer", lambda *args, **options: streams.append(args[3:5])
    )
    monkeypatch.setattr("minglm.recipe.training.Muon", lambda *args: None)
    shown = dataclasses.replace(small().posttraining, shown=("arithmetic:6", "instructions:1"))
    context = dataclasses.replace(context, run=dataclasses.replace(small(), posttraining=shown))
    monkeypatch.setattr("minglm.recipe.training.trained_by_rl", lambda *args: 50_000)
    stage = planned(name)
    train_control(context, stage, None)
    ((stream, phase),) = streams
    rows = stage.config.batch_tokens // stage.config.sequence_length
    for _ in range(math.ceil(phase.tokens / stage.config.batch_tokens)):
        stream.next(rows)
    assert all(0.5 < epochs <= 1 for epochs in stream.epochs.values())


@pytest.mark.parametrize("faults", [0, 1])
def test_mining_is_logged_and_says_where_nothing_provoked(context, monkeypatch, faults):
    """Prompts asked and kept by environment; where none is kept, a line says what follows. Kinds have their difficulties."""
    stage = planned("pathology_rl")
    asked = []

    def mine(screener, config, thinking_share):
        for name, kind in screener.environments.items():
            asked.append((name, kind.default_difficulties))
            asked_of[name] = Problem(kind.task(0, 1), True)
        return Mined([*asked_of.values()], [Counted(0, 3), Counted(faults, 3)])

    asked_of = {}
    monkeypatch.setattr("minglm.recipe.training.mine", mine)
    found = provoking_of(context, stage, None)
    assert asked == [("provocation", (1, 2, 3)), ("constraints", (4, 5))]
    assert found == [asked_of["constraints"]] * faults
    record = select(read_records(context.log.path), MiningRecord)[-1]
    assert record.asked == {"provocation": 1, "constraints": 1}
    assert (record.answers, record.faulty) == (6, faults / 6)
    assert record.provoking == dict.fromkeys(["constraints"] * faults, 1)
    assert (record.note is None) == bool(faults)


def test_conversations_that_do_not_fit_are_left_out(context):
    """A row that holds no conversation at all is refused in one line."""
    short = dataclasses.replace(small().posttraining.reasoning.sft, sequence_length=4)
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    with pytest.raises(
        ValueError, match=r"reasoning\.sft: no conversation fits sequence_length = 4"
    ):
        found = fitting(context.tokenizer, {"arithmetic": [(messages, (), False)]}, 4)
        fine_tune(context, "reasoning.sft", short, None, found)


def test_examples_longer_than_a_row_are_counted(context, monkeypatch, capsys):
    """The log says how many examples of which environment are missing; an environment without any is named too."""
    monkeypatch.setattr("minglm.recipe.training._run_trainer", lambda *args, **options: None)
    monkeypatch.setattr("minglm.recipe.training.Muon", lambda *args: None)

    def conversation(words):
        messages = [
            {"role": "user", "content": "1+1="},
            {"role": "assistant", "content": "2 " * words},
        ]
        return messages, (), False

    config = dataclasses.replace(small().posttraining.reasoning.sft, sequence_length=64)
    conversations = {
        "arithmetic": [conversation(1), conversation(100), conversation(2)],
        "code": [conversation(100)],
    }
    found = fitting(context.tokenizer, conversations, config.sequence_length)
    fine_tune(context, "reasoning.sft", config, None, found)
    record = select(read_records(context.log.path), ConversationsRecord)[-1]
    assert record.stage == "reasoning.sft"
    assert record.examples == {"arithmetic": 3, "code": 1}
    assert record.too_long == {"arithmetic": 1, "code": 1}
    assert record.tokens == found.sizes and record.tokens.keys() == {"arithmetic"}
    assert "1 of 1 examples of code are left out" in capsys.readouterr().err
