"""README is true: its commands run, its paths exist, and its first screen is what continuous integration does.

Every command in a `sh` block is run with a small config, `configs/nano.py` with a few steps per stage. `.ci/run` runs
what is only compared here: `pip`, `pytest`, lessons, and rehearsals of large worlds.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.command import ROOT, Started, minglm
from helpers.nano_run import complete, copied, finished
from helpers.package_map import LINK, PAGE, dead_links, updated, with_metrics

__all__ = ["copied", "finished"]  # fixtures

REHEARSALS = "tests/launch/test_dry_runs.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text):
    """Return every command of the `sh` blocks, `&&` taken apart."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [command.strip() for line in lines for command in line.split("&&")]


COMMANDS = list(dict.fromkeys(commands(README)))
RUNNABLE = [
    command
    for command in COMMANDS
    if command.startswith("python -m minglm ") and not re.search(r"launch .* --dry-run", command)
]


def run(*words):
    """Run `python -m minglm` with these words to its end. Return what it printed."""
    status, printed, errors = Started(minglm, *map(str, words)).end()
    assert status == 0, f"{shlex.join(map(str, words))}\n{printed[-3000:]}\n{errors[-3000:]}"
    return printed


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


def test_what_is_not_run_here_is_run_by_ci():
    """Every lesson with `--smoke`, the tests of each file, and the rehearsal of each layout that README rehearses."""
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in COMMANDS:
        words = shlex.split(command.removeprefix("HYPOTHESIS_PROFILE=nightly "))
        if words[0] == "pytest":
            assert all(path.startswith("tests/") and (ROOT / path).exists() for path in words[1:])
        elif words[1].startswith("lessons/"):
            assert re.fullmatch(r"lessons/\d\d\w+\.py", words[1]) and (ROOT / words[1]).exists()
            assert "in lessons/[0-9]*.py" in steps and '"$lesson" --smoke' in steps
        elif command not in RUNNABLE and words[0] != "pip":
            layout = re.search(r" launch configs/(\S+) --dry-run --stage general", command)[1]
            assert f'("{layout}", "general")' in (ROOT / REHEARSALS).read_text(encoding="utf-8")
    assert re.search(r"^pytest -m ci$", steps, re.MULTILINE)


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
    """minglm/README.md lists every file by the first sentence of its header, and its links name what is there."""
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page) == page, "run: python tests/helpers/package_map.py"
    assert len(LINK.findall(page)) > 40
    assert dead_links(page) == []


def test_a_changed_header_and_a_moved_definition_are_noticed():
    """The broken twins of the test above."""
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page.replace("├── model/", "├── models/")) == page
    assert dead_links("[`no_such_name`](train/loop.py)") == ["no_such_name in train/loop.py"]
    assert dead_links("[`Phase`](train/loop.py), [`Phase`](train/loss.py)") == [
        "Phase in train/loss.py"
    ]


@pytest.mark.parametrize(
    "block", re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
)
def test_python_block_runs(block):
    """Every block of Python in README runs as it stands."""
    status, _, errors = Started(exec, block, {}).end()
    assert status == 0, errors


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
def test_command_runs(command, finished, copied, tmp_path):
    """Every command of README runs to its end without an error."""
    verb, *words = shlex.split(command)[3:]
    if verb == "run" and "--help" in words:
        assert "--model.hidden_size" in run(verb, *words)
    elif verb == "run":
        check_run(words[1:], finished, copied, tmp_path)
    elif verb == "chat":
        check_chat(finished)
    elif verb == "serve":
        check_server(finished)
    else:
        # A copy: the picture of the stages is drawn beside its folder.
        config = tmp_path / "configs" / "nano.py"
        config.parent.mkdir()
        shutil.copy(ROOT / "configs" / "nano.py", config)
        small = {"runs/toy": copied, "configs/toy.py": config}
        small |= {
            name: tmp_path / name for name in words if name.startswith(("exported/", "runs/again"))
        }
        if verb == "import":
            run("export", finished, small["exported/toy"])
        assert run(verb, *[small.get(word, word) for word in words])


def check_chat(finished):
    """Check README's chat, from nothing: it answers until its input ends."""
    done = subprocess.run(
        [sys.executable, "-m", "minglm", "chat", str(finished)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input="/nothink\nhello\n/tools\n/think\nhello\n",
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


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
            with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=300) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] <= 4
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=300) in (0, 130, -signal.SIGINT)
        finally:
            server.kill()


def check_run(options, finished, copied, tmp_path):
    """Check README's variations of `minglm run`: the same options with a small config, in a folder of their own."""
    if not options:
        assert (finished / "report.md").exists()
        assert list((finished / "figures").glob("*.png"))
        return
    at = options.index("--out")
    options[at : at + 2] = []
    if "--until" in options:  # goes on with the run that is there
        status, printed, errors = complete(copied, *options)
    else:
        few = ["--until", "general", "--stages.general.tokens", "4096"]
        status, printed, errors = complete(tmp_path / "run", *options, *few)
        assert (tmp_path / "run" / "log.jsonl").exists()
    assert status == 0, f"{printed}\n{errors}"
