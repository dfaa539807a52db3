"""README is true: its commands run, its paths exist, and its first screen is what continuous integration does.

Every command in a `sh` block is run as a new user would type it, made small: a config becomes `configs/nano.py` with a
few steps per stage, a lesson gets `--smoke`, `pip` and the whole suite are only compared with `.ci/run`, and `pytest` of a file only collects.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.package_map import LINK, PAGE, updated, with_metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

PHASE = {"samples": 12, "epochs": 1}
ROLLOUT = {"steps": 1, "prompts": 2, "samples": 2, "max_new_tokens": 16}
SMALL = {
    **{
        f"stages.{name}.tokens": 4096
        for name in ("general", "code_reasoning", "repository", "reasoning", "long_agent")
    },
    **{
        f"posttraining.{name}.sft.{k}": v
        for name in ("reasoning", "agent", "chat")
        for k, v in PHASE.items()
    },
    **{
        f"posttraining.{name}.rl.{k}": v
        for name in ("reasoning", "agent", "chat")
        for k, v in ROLLOUT.items()
    },
    **{
        f"posttraining.{name}.{k}": v
        for name in ("general_rl", "pathology_rl")
        for k, v in ROLLOUT.items()
    },
    **{f"posttraining.unified.{k}": v for k, v in PHASE.items()},
    "optimizer.warmup_tokens": 2048,
    "optimizer.batch_tokens_start": 1024,
    "optimizer.batch_tokens_end": 2048,
    "posttraining.prompts_per_environment": 4,
    "posttraining.responses_per_prompt": 1,
    "data.corpus_megabytes": 0.3,
    "data.synthetic_documents": 60,
    "data.trajectories": 60,
    "evaluation.problems": 2,
    "evaluation.samples": 1,
    "evaluation.max_new_tokens": 16,
    "evaluation.heldout_tokens": 2000,
}


def commands(text):
    """Return every command of the `sh` blocks, `&&` taken apart."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [command.strip() for line in lines for command in line.split("&&")]


COMMANDS = list(dict.fromkeys(commands(README)))
# The commands that are run: not `pip`, and not the whole suite, which is running already. A profile draws more examples,
# but collects the same tests.
RUNNABLE = list(
    dict.fromkeys(
        command.removeprefix("HYPOTHESIS_PROFILE=nightly ")
        for command in COMMANDS
        if not command.startswith("pip ") and command != "pytest"
    )
)


def run(command, **options):
    """Run a command of README in the root of the project with this Python. Returns what it printed."""
    words = [sys.executable if word == "python" else word for word in command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HYPOTHESIS_PROFILE": "ci"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, **options
    )
    assert done.returncode == 0, (
        f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def small_run(folder, extra=()):
    """Run `minglm run` of the nano config with a few steps per stage."""
    overrides = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return run(
        [
            "python",
            "-m",
            "minglm",
            "run",
            "configs/nano.py",
            "--out",
            str(folder),
            *overrides,
            *extra,
        ]
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a run folder that every command which needs one shares. (All stages in full: tests/recipe/test_run.py.)"""
    folder = tmp_path_factory.mktemp("readme") / "run"
    small_run(folder, ["--until", "reasoning.rl"])
    return folder


def test_the_blocks_are_found():
    """An empty list of commands would make every test below true."""
    assert len(COMMANDS) >= 10
    assert commands("```sh\na && b\n```\n```python\nc\n```\n") == ["a", "b"]


def test_first_screen_is_what_ci_does():
    """`.ci/run` installs and tests with README's second command, and runs its first at nano scale."""
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert COMMANDS[:4] == [
        "pip install -e .",
        "python -m minglm run configs/toy.py",
        "pip install -e '.[test]'",
        "pytest",
    ]
    assert re.search(r"^pip install (--quiet )?-e '\.\[test\]'$", steps, re.MULTILINE)
    assert re.search(r"^pytest$", steps, re.MULTILINE)
    assert re.search(r"^python -m minglm run configs/nano\.py ", steps, re.MULTILINE)


def test_paths_exist():
    """Every file and folder that README names is there."""
    named = set(re.findall(r"(?:minglm|lessons|tests|figures|configs)/[\w/]*\w+\.\w+", README))
    named = {name for name in named if not name.startswith("runs")}
    assert named
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_the_map_names_every_folder_and_lesson():
    """README's map has at most a dozen rows, and every folder that a section of the paper describes is in one."""
    start = README.index("## The map of the paper")
    rows = [
        line for line in README[start:].partition("\n## ")[0].splitlines() if line.startswith("| ")
    ][1:]
    assert len(rows) <= 12
    support = {"common", "config", "cli", "bench", "testing", "parallel"}  # of no section
    folders = {path.parent.name for path in (ROOT / "minglm").glob("*/__init__.py")} - support
    assert not [
        name for name in sorted(folders) if not any(f"`minglm/{name}/`" in row for row in rows)
    ]
    numbers = {path.name[:2] for path in (ROOT / "lessons").glob("[0-9]*.py")}
    assert not [number for number in sorted(numbers) if not any(number in row for row in rows)]


def test_the_map_of_the_package_is_up_to_date():
    """minglm/README.md lists every file by the first sentence of its header, and its links point to the right lines."""
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page) == page, "run: python tests/helpers/package_map.py"


def test_a_changed_header_and_a_moved_definition_are_noticed():
    """The broken twins of the test above."""
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page.replace("├── model/", "├── models/")) == page
    link = LINK.search(page)
    assert link is not None
    moved = page.replace(link[0], link[0].replace("#L", "#L9"))
    assert moved != page and updated(moved) == page
    with pytest.raises(ValueError, match="nothing is called"):
        updated(page + "[`no_such_name`](train/loop.py)")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(re.findall("^```python", README, re.MULTILINE))))
def test_python_block_runs(number):
    """Every block of Python in README runs as it stands."""
    run(
        [
            "python",
            "-c",
            re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[number],
        ]
    )


def test_every_contract_is_named():
    """README's table of contracts has each contract that `minglm.testing` offers, beside the file it is in."""
    parts = {
        "check_tasks",
        "check_oracle",
        "check_lazy_answers",
        "check_malformed_messages",
        "check_chance",
    }
    for path in sorted((ROOT / "minglm" / "testing").glob("[a-z]*.py")):
        row = next(
            (
                line
                for line in README.splitlines()
                if line.startswith(f"| `minglm/testing/{path.name}`")
            ),
            "",
        )
        # Of check_environment.
        names = (
            set(re.findall(r"^def (check_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
            - parts
        )
        assert not [name for name in sorted(names) if f"`{name}`" not in row], path.name


def test_the_tables_of_metrics_are_those_of_the_records():
    """README explains every metric as the docstring of its record's field does."""
    assert with_metrics(README) == README, "run: python tests/helpers/package_map.py"
    assert with_metrics(README.replace("| `loss` | ", "| `loss` | not ")) == README


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNABLE)
def test_command_runs(command, finished, tmp_path):
    """Every command of README runs to its end without an error."""
    words = shlex.split(command)
    if words[0] == "pytest":
        assert "test" in run(
            ["python", "-m", "pytest", "-n", "0", "--collect-only", "-q", *words[1:]]
        )
    elif words[1].startswith("lessons/"):
        run([*words, *(["--smoke"] if "--smoke" not in words else [])])
    elif words[1:4] == ["-m", "minglm", "run"]:
        if "--help" in words:
            assert "--model.hidden_size" in run(words)
        else:
            check_run(words[4:], finished, tmp_path)
    elif words[1:4] == ["-m", "minglm", "chat"]:
        run(
            ["python", "-m", "minglm", "chat", str(finished)],
            input="/nothink\nhello\n/tools\n/think\nhello\n",
        )
    elif words[1:4] == ["-m", "minglm", "serve"]:
        check_server(finished)
    else:
        # A copy: the picture of the stages is drawn beside its folder.
        config = tmp_path / "configs" / "nano.py"
        config.parent.mkdir()
        shutil.copy(ROOT / "configs" / "nano.py", config)
        small = {"runs/toy": finished, "configs/toy.py": config}
        small |= {
            name: tmp_path / name for name in words if name.startswith(("exported/", "runs/again"))
        }
        if words[3] == "import":
            run(["python", "-m", "minglm", "export", str(finished), str(small["exported/toy"])])
        assert run([str(small.get(word, word)) for word in words])


def check_server(finished):
    """Check README's server: it says where it listens, answers, and ends with Ctrl-C."""
    import json
    import signal
    from urllib.request import Request, urlopen

    command = [
        sys.executable,
        "-m",
        "minglm",
        "serve",
        str(finished),
        "--port",
        "0",
        "--name",
        "toy",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def take_interrupts():  # a test suite in the background has Ctrl-C switched off
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=take_interrupts
    ) as server:
        try:
            printed = [server.stdout.readline() for _ in range(3)]
            body = {
                "model": "toy",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 4,
            }
            url = printed[2].split()[1] + "/chat/completions"
            headers = {"Content-Type": "application/json"}
            with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=100) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] <= 4
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) in (0, 130, -signal.SIGINT)
        finally:
            server.kill()


def check_run(words, finished, tmp_path):
    """Check README's variations of `minglm run`: the same options with a small config, in a folder of their own."""
    options = words[1:]
    if "--out" in options:
        at = options.index("--out")
        options = options[:at] + options[at + 2 :]
    if not options:
        assert (finished / "report.md").exists()
        assert list((finished / "figures").glob("*.png"))
        return
    if "--until" not in options:
        options += ["--until", "general"]
    small_run(tmp_path / "run", options)
    assert (tmp_path / "run" / "log.jsonl").exists()
