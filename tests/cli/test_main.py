"""The command line: what each verb prints, its exit status, and one line for every mistake."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers.nano_run import CONFIG, OVERRIDES, ROOT, copied, finished, records, small

from minglm.__main__ import main
from minglm.cli import main as command_line
from minglm.cli.registry import VERBS
from minglm.data.store.shards import load_shards
from minglm.eval.text import bits_per_byte
from minglm.plan.counts import count_parameters
from minglm.recipe.load import load_run

__all__ = ["copied", "finished"]  # fixtures

on_a_run = pytest.mark.slow  # what needs the finished run


def output(capsys, *words, status=0):
    """Return what a command prints; check its exit status."""
    assert main([str(word) for word in words]) == status
    captured = capsys.readouterr()
    if status:
        assert captured.err.startswith("minglm: ") and captured.err.count("\n") == 1, captured.err
        return captured.err
    return captured.out


def test_the_first_help(capsys):
    """Without a word, or with --help: every verb with what it does."""
    for words in ([], ["--help"], ["-h"]):
        printed = output(capsys, *words)
        assert all(re.search(rf"^    {name} ", printed, re.MULTILINE) for name in VERBS)


def test_an_unknown_verb(capsys):
    """The verbs that exist are named."""
    line = output(capsys, "rum", status=2)
    assert "'rum'" in line and all(name in line for name in VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb, capsys):
    """--help says what the verb does and lists its options, exit status 0."""
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: python -m minglm {verb}" in printed
    assert len(printed.splitlines()) > 5


def test_help_with_a_config_lists_every_field(capsys):
    """Fields of all sections, with their meaning."""
    with pytest.raises(SystemExit) as end:
        main(["run", CONFIG, "--help"])
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert end.value.code == 0
    for name in (
        "--until",
        "--model.hidden_size",
        "--stages.general.tokens",
        "--evaluation.problems",
    ):
        assert name in printed
    assert "Width D of the residual stream" in printed


@pytest.mark.parametrize(
    "words", [["run"], ["chat"], ["eval"], ["plan"], ["eval", "a", "--problems", "many"]]
)
def test_missing_words(words, capsys):
    """What argparse refuses: one line with the name of what is missing or wrong."""
    line = output(capsys, *words, status=2)
    assert re.search(r"(config|run|--problems)", line)
    assert "--help" in line


def modules_and_output(*words):
    """Run a command in a process of its own; return the modules it imported, and its output."""
    program = (
        "import sys, minglm.__main__\n"
        "try: minglm.__main__.main(sys.argv[1:])\n"
        "finally: print('MODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True
    )
    printed, modules = done.stdout.split("MODULES ")
    return set(modules.split()), printed


HEAVY = {"torch", "numpy", "tyro", "triton", "matplotlib", "tokenizers", "safetensors", "tqdm"}


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_quick_because_it_imports_nothing_heavy(verb):
    """No package that takes a tenth of a second to import, and few modules, of which each takes about a millisecond."""
    modules, printed = modules_and_output(*([verb] if verb else []), "--help")
    assert not modules & HEAVY
    assert len(modules) < 250
    assert printed


def test_the_package_is_imported_without_torch_and_its_threads_are_set_before():
    """`import minglm` is light, GLM and load_config come when they are asked for, with a thread for each core."""
    program = (
        "import sys, minglm; assert 'torch' not in sys.modules; minglm.load_config; "
        "assert 'torch' not in sys.modules; minglm.GLM; import os, torch; "
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'; print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(len(os.sched_getaffinity(0))), done.stderr


def test_the_variable_sets_the_threads_of_torch():
    """OMP_NUM_THREADS reaches the pool that torch starts after minglm is imported."""
    done = subprocess.run(
        [sys.executable, "-c", "import minglm, torch; print(torch.get_num_threads())"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "1", done.stderr


MISTAKES = {
    "no such config": (["run", "configs/none.py"], "configs/none.py"),
    "no such function": (["run", f"{CONFIG}:micro"], "has no function micro()"),
    "unknown option": (["run", CONFIG, "--model.hiden_size", "64"], "--model.hiden_size"),
    "a word that belongs nowhere": (["run", CONFIG, "fast"], "fast"),
    "not a number": (["run", CONFIG, "--model.hidden_size", "wide"], "wide"),
    "heads": (["run", CONFIG, "--model.num_key_value_heads", "3"], "model.num_attention_heads = 4"),
    "experts": (
        ["run", CONFIG, "--model.num_experts_per_tok", "9"],
        "model.num_experts_per_tok = 9",
    ),
    "top-1": (["run", CONFIG, "--model.num_experts_per_tok", "1"], "the router gets no gradient"),
    "context": (
        ["run", CONFIG, "--stages.long_agent.sequence_length", "4096"],
        "max_position_embeddings = 2048",
    ),
    "environment": (
        ["run", CONFIG, "--posttraining.general_rl.environments", "chess"],
        "must be some of arithmetic",
    ),
    "no environment": (
        ["run", CONFIG, "--posttraining.chat.rl.environments"],
        "posttraining.chat.rl.environments",
    ),
    "device": (["run", CONFIG, "--device", "tpu"], "must be auto, cpu or cuda"),
    "only": (["run", CONFIG, "--only", "sleeping"], "--only sleeping: no such stage"),
    "until": (["run", CONFIG, "--until", "long"], "the stages are general, code_reasoning"),
    "plan": (["plan", CONFIG, "--model.hiden_size", "64"], "--model.hiden_size"),
    "no run to talk to": (["chat", "{tmp}"], "is not the folder of a run"),
    "no run to score": (["eval", "{tmp}/nothing"], "is not the folder of a run"),
    "no run to draw": (["figures", "{tmp}"], "{tmp}"),
    "nothing to draw": (["figures", "{tmp}/none.json"], "none.json"),
    "temperature": (["chat", "{tmp}", "--temperature", "-1"], "--temperature"),
    "nucleus": (["chat", "{tmp}", "--top-p", "0"], "--top-p"),
    "no tokens": (["chat", "{tmp}", "--max-new-tokens", "0"], "--max-new-tokens"),
    "no name of a figure": (["plan", CONFIG, "--figure", "/"], "'/': is a folder; give a file"),
    "a partition of two lines": (
        ["launch", CONFIG, "--slurm", "--partition", "a\n#SBATCH"],
        "one word",
    ),
    "an account for a shell": (["launch", CONFIG, "--slurm", "--account", "$(id)"], "one word"),
    "an --out that is a file": (["run", CONFIG, "--out", "{tmp}/file"], "{tmp}/file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_starts_nothing(name, capsys, tmp_path, monkeypatch):
    """Exit status 2, one line with the field or word and the remedy; no folder is made."""
    words, part = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    line = output(capsys, *[word.replace("{tmp}", str(tmp_path)) for word in words], status=2)
    assert part.replace("{tmp}", str(tmp_path)) in line
    assert os.listdir(tmp_path) == ["file"]


IDLE = [
    (
        ["run", CONFIG, "--only", "general", "--until", "general"],
        "--until changes nothing with --only",
    ),
    (["plan", CONFIG, "--beside", CONFIG], "--beside changes nothing without --figure"),
    (
        ["launch", CONFIG, "--torchrun", "--stage", "general"],
        "--stage changes nothing without --dry-run",
    ),
    (["launch", CONFIG, "--dry-run", "--script", "x"], "--script changes nothing with --dry-run"),
    (["launch", CONFIG, "--torchrun", "--hours", "2"], "--hours changes nothing without --slurm"),
    (["launch", CONFIG, "--slurm", "--image", "x"], "--image changes nothing without --kubernetes"),
    (["data", CONFIG, "--dry-run", "--verify"], "--verify changes nothing with --dry-run"),
    (["data", CONFIG, "--json", "--samples", "0"], "--samples changes nothing with --json"),
    (["eval", ".", "--harness", "--task", "code"], "--task changes nothing with --harness"),
]


@pytest.mark.parametrize(("words", "part"), IDLE)
def test_an_option_that_changes_nothing_is_refused(words, part, capsys, tmp_path, monkeypatch):
    """By name, and before anything is read or written."""
    monkeypatch.chdir(tmp_path)
    assert part in output(capsys, *words, status=2)
    assert os.listdir(tmp_path) == []


def endless(folder, place):
    """Return a command that is given a pipe that nobody writes to, in some place."""
    run = folder / "run"
    run.mkdir()
    os.mkfifo(folder / "pipe")
    os.mkfifo(run / "config.json")
    os.mkfifo(run / "log.jsonl")
    environments = ["run", CONFIG, "--dry-run", "--posttraining.reasoning.rl.environments"]
    return {
        "config": ["run", folder / "pipe", "--dry-run"],
        "data": ["run", CONFIG, "--dry-run", "--data.files", folder / "pipe"],
        "tokenizer": ["run", CONFIG, "--dry-run", "--data.tokenizer", folder / "pipe"],
        "world": [*environments, f"world:{folder / 'pipe'}"],
        "endless world": [*environments, "world:/dev/zero"],
        "issue": [*environments, f"swe:{ROOT}?issue={folder / 'pipe'}"],
        "released checkpoint": ["import", CONFIG, run, "--out", folder / "new"],
        "run": ["eval", run],
        "log": ["figures", run],
        "page": ["view", run, "--html", folder / "page.html"],
        "figure": ["figures", folder / "pipe"],
    }[place]


@pytest.mark.parametrize(
    "place",
    [
        *("config", "data", "tokenizer", "world", "endless world", "issue"),
        *("released checkpoint", "run", "log", "page", "figure"),
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(place, capsys, tmp_path):
    """Wherever a file is read: one line, where the twin, which opens it, would wait for ever."""
    line = output(capsys, *endless(tmp_path, place), status=2)
    assert str(tmp_path) in line or "/dev/zero" in line
    assert sorted(os.listdir(tmp_path)) == ["pipe", "run"]


def test_a_dry_run_starts_nothing(capsys, tmp_path, monkeypatch):
    """The stages and the resolved config, overrides applied, as JSON; no folder is made."""
    monkeypatch.chdir(tmp_path)
    printed = output(capsys, "run", CONFIG, "--dry-run", *OVERRIDES)
    assert os.listdir(tmp_path) == []
    table, rest = printed.split("\n{", 1)
    config, last = json.JSONDecoder().raw_decode("{" + rest)
    assert config["stages"]["general"]["tokens"] == 12_000
    assert config["name"] == "nano"
    names = [line.split()[0] for line in table.splitlines()[2:]]
    assert names[:5] == ["general", "code_reasoning", "repository", "reasoning", "long_agent"]
    assert names[-3:] == ["unified", "general_rl", "pathology_rl"]
    assert f"{count_parameters(small().model)['body']:,} parameters" in ("{" + rest)[last:]


@pytest.mark.parametrize("config", ["nano", "toy", "air_106b", "glm45_355b"])
def test_plans(config, capsys):
    """--json is JSON, and the other form is text for people; overrides and GPUs count."""
    words = ["plan", ROOT / "configs" / f"{config}.py", "--gpus", "512"]
    plan = json.loads(output(capsys, *words, "--json"))
    text = output(capsys, *words)
    assert plan and len(text.splitlines()) > 5
    longer = json.loads(output(capsys, *words, "--json", "--stages.long_agent.tokens", "7"))
    assert longer != plan


def test_interrupts_and_broken_files_are_no_tracebacks(capsys, monkeypatch):
    """Ctrl-C anywhere is status 130; an error of the file system names its file; others are not hidden."""
    for error, status in (
        (KeyboardInterrupt(), 130),
        (PermissionError(13, "Permission denied", "/srv/run"), 2),
        (OSError(28, "No space left on device"), 2),
    ):
        monkeypatch.setattr(
            command_line, "run_verb", lambda *_, error=error: (_ for _ in ()).throw(error)
        )
        assert main(["run"]) == status
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert status == 130 or "/srv/run: Perm" in printed or "disk is full" in printed
    monkeypatch.setattr(command_line, "run_verb", lambda *_: [][1])
    with pytest.raises(IndexError):
        main(["run"])


@on_a_run
def test_eval_repeats_the_evaluation_of_the_run(finished, capsys):
    """The records of the last stage's evaluation, number by number, from its checkpoint alone; and other tasks beside."""
    printed = output(capsys, "eval", finished, "--json")
    found = [json.loads(line) for line in printed.splitlines()]
    logged = [r for r in records(finished, "evaluation") if r["stage"] == "pathology_rl"]
    tasks = {record["env"] for record in logged}
    repeated = [record for record in found if record.get("env") in tasks]  # averages have none
    assert len(repeated) == len(logged) == 26  # thirteen tasks, twelve of them of Figure 1
    assert all(record | {"kind": "evaluation"} in logged for record in repeated)
    assert {"airline", "functions", "search", "swe"} <= {record.get("env") for record in found}


@on_a_run
def test_eval_of_a_stage_and_a_task(finished, capsys):
    """One line a mode: task, avg@k with its interval, pass@k."""
    words = [
        "eval",
        finished,
        "--stage",
        "reasoning.sft",
        "--task",
        "arithmetic",
        "--problems",
        "3",
        "--samples",
        "1",
    ]
    lines = output(capsys, *words).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["arithmetic", m, "avg@1"] for m in ("thinking", "direct")
    ]
    assert all(re.search(r"0\.000 \(0\.000 to 0\.\d+\)  pass@1 0\.000", line) for line in lines)


@on_a_run
def test_eval_by_thinking_budget(finished, capsys, tmp_path):
    """One line a budget in the order given, once each, and a figure of them."""
    figure = tmp_path / "budgets.png"
    words = ["--task", "arithmetic", "--problems", "2", "--samples", "1", "--figure", str(figure)]
    lines = output(
        capsys, "eval", finished, *words, "--thinking-budget", "4", "0", "4"
    ).splitlines()
    assert [line.split()[:5] for line in lines[:-1]] == [
        ["arithmetic", "thinking", "up", "to", budget] for budget in ("4", "0")
    ]
    assert lines[-1] == str(figure) and figure.read_bytes().startswith(b"\x89PNG")


@on_a_run
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["eval", "--stage", "sleeping"], "no complete stage sleeping; complete: general, "),
        (["eval", "--task", "chess"], "--task: chess: must be some of arithmetic"),
        (["eval", "--task", "gym:chess"], "--task: gym:chess: reasoning-gym has no such generator"),
        (["eval", "--task", "arithmetic", "--user", "x"], "--user: no user takes part in"),
        (["eval", "--task", "world:nothing.json"], "--task: world nothing.json: cannot be read"),
        (["eval", "--problems", "0"], "--problems: '0'"),
        (["eval", "--samples", "-2"], "--samples: '-2'"),
        (["eval", "--thinking-budget", "-1"], "--thinking-budget: '-1'"),
        (["eval", "--figure", "x.png"], "--figure changes nothing without --thinking-budget"),
        (["eval", "--figure", "/dev/null/x.png", "--thinking-budget", "1"], "--figure /dev/null"),
        (["chat", "--stage", "sleeping"], "no complete stage sleeping"),
    ],
)
def test_mistakes_with_a_run(finished, capsys, words, part):
    """Stages, tasks and numbers that do not exist."""
    assert part in output(capsys, words[0], finished, *words[1:], status=2)


@on_a_run
def test_a_run_without_a_complete_stage(copied, capsys):
    """Nothing to talk to yet, in one line."""
    for path in (copied / "checkpoints").rglob("final"):
        shutil.rmtree(path)
    for verb in ("chat", "eval"):
        assert "no complete stage; complete: none" in output(capsys, verb, copied, status=2)


@on_a_run
@pytest.mark.parametrize("damage", ["checkpoint", "tokenizer"])
def test_damaged_files_of_a_run(copied, capsys, damage):
    """The damaged file is named."""
    final = "checkpoints/pathology_rl/final"
    shard = f"{final}/shard-00001-model-00001-of-00001.safetensors"
    file, named = {
        "checkpoint": (shard, final),
        "tokenizer": ("data/tokenizer.json", "data/tokenizer.json"),
    }[damage]
    (copied / file).write_bytes((copied / file).read_bytes()[:-500])
    assert named in output(capsys, "eval", copied, status=2)


@on_a_run
@pytest.mark.parametrize("stage", ["general", "long_agent"])
def test_a_stage_is_loaded_as_it_was_trained(finished, stage):
    """Bits per byte of the loaded model are those in the log, which needs the stage's own rotary base."""
    with pytest.raises(ValueError, match="device = 'tpu': must be auto, cpu or cuda"):
        load_run(finished, stage, "tpu")
    loaded = load_run(finished, stage)
    trained = getattr(loaded.config.stages, stage)
    assert loaded.stage == stage
    assert loaded.model.rope_theta == trained.rope_theta
    heldout = load_shards(finished / "data" / "heldout")["prose"]
    length = min(trained.sequence_length, 1024)
    tokens = loaded.config.evaluation.heldout_tokens
    found = bits_per_byte(loaded.model, loaded.tokenizer, heldout, length, tokens)
    logged = [r for r in records(finished, "bits_per_byte") if r["source"] == "prose"]
    (expected,) = [r["value"] for r in logged if r["stage"] == stage]
    assert found == pytest.approx(expected, rel=1e-6)


@on_a_run
def test_chat_with_a_run(finished, capsys, monkeypatch):
    """Lines from standard input, answers on standard output, until the input ends."""
    monkeypatch.setattr("sys.stdin", io.StringIO("/nothink\nhello\n/tools\nhello\n"))
    printed = output(capsys, "chat", finished, "--max-new-tokens", "5", "--stage", "unified")
    assert printed.startswith("stage unified\n")
    assert "thinking off" in printed
    assert "tools on" in printed


@on_a_run
def test_figures_of_a_run_are_redrawn(copied, capsys):
    """From the log alone, the same bytes as before; the paths are printed."""
    before = {path: path.read_bytes() for path in (copied / "figures").glob("*.png")}
    for path in before:
        path.unlink()
    printed = output(capsys, "figures", copied).split()
    assert sorted(printed) == sorted(map(str, before))
    assert all(path.read_bytes() == data for path, data in before.items())
