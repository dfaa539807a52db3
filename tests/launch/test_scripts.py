"""Scripts that start a run on a cluster: every one is parsed, Kubernetes' by its published schema, Slurm's by Slurm."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.__main__ import main
from minglm.config import load_config
from minglm.launch.job import Job, check_nodes, make_job
from minglm.launch.scripts import kubernetes_objects, slurm_script, torchrun_script
from minglm.plan.gpus import GPUS

CONFIGS = Path(__file__).parent.parent.parent / "configs"
H100 = GPUS["h100"]


ENGINE = ("--rollout_engine", "http://rollouts:8000")
"""On GPUs of its own: with an engine in each rank no full-size config fits in RL."""


def job(config="glm45_355b.py:h100x512", until=None, overrides=ENGINE, gpus=0):
    """The job of a shipped layout."""
    path = str(CONFIGS / config)
    return make_job(load_config(path, overrides), path, overrides, "runs/x", H100, gpus, until)


@st.composite
def jobs(draw):
    """A job of any size, whose words need quotes."""
    word = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=9)
    command = st.lists(word, min_size=1, max_size=4)
    return Job(
        name=draw(st.from_regex(r"[a-z][a-z0-9-]{0,30}[a-z0-9]", fullmatch=True)),
        nodes=draw(st.integers(1, 64)),
        per_node=draw(st.integers(1, 8)),
        commands=draw(st.lists(command, min_size=1, max_size=3)),
        stages=[],
        check=draw(command),
    )


def words_after(text, function="minglm"):
    """The words of every line that calls the shell function, as a shell sees them."""
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{function} ")]


def until_of(made):
    """The stage that each command of a job ends with; None for the end of the run."""
    return [
        command[command.index("--until") + 1] if "--until" in command else None
        for command in made.commands
    ]


def layouts_of(made):
    """The layout of each command of a job."""
    found = []
    for command in made.commands:
        config = load_config(command[1], command[6:] if "--until" in command else command[4:])
        found.append(config.parallel.layout(made.gpus, config.model))
    return found


# Where the layout changes: RL, whose answers are shorter, and the fine-tunings in between.
POST = ["reasoning.sft", "reasoning.rl", "agent.sft", "agent.rl", "chat.sft", "chat.rl", "unified"]


@pytest.mark.parametrize("variant", ["h100x512", "h100x512_128k"])
def test_one_run_goes_through_the_layouts_that_its_rows_need(variant):
    """Rows of 4K, 32K and 128K: whole, shared by 2 and by 8 GPUs, answers of 64K by 4; one layout for all of a config that shares
    every row by 8."""
    made = job(f"glm45_355b.py:{variant}")
    assert (made.nodes, made.per_node, made.gpus) == (64, 8, 512)
    wide = variant.endswith("128k")  # whose layout shares all rows
    rows = ["code_reasoning", "reasoning", "long_agent"]
    assert until_of(made) == (["long_agent", None] if wide else [*rows, *POST, None])
    shared = [8, 8] if wide else [1, 2, 8, *[8, 4] * 4]
    assert [layout.cp for layout in layouts_of(made)] == shared
    for command in made.commands:
        assert command[0] == "run" and command[2:4] == ["--out", "runs/x"]


def test_a_pipeline_is_for_stages_whose_rows_are_whole():
    """Shared rows and post-training go through none: its ranks shard the weights there."""
    pipeline = [
        *ENGINE,
        "--parallel.pp",
        "4",
        "--parallel.interleave",
        "2",
        "--parallel.fsdp",
        "64",
        "--parallel.ep",
        "32",
    ]
    made = job("glm45_355b.py", overrides=pipeline, gpus=256)
    first, *others = layouts_of(made)
    assert first == (4, 1, 64, 32, 1, 2)
    assert others == [(1, 1, 256, 32, cp, 1) for cp in (2, 8, *[8, 4] * 4)]
    assert [words[1] for _, words in made.stages] == ["4", "4", "1", "1", "1"]


def test_until_stops_early():
    """No command follows the stage that was named; a stage that does not exist is one line."""
    assert [command[5] for command in job(until="repository").commands] == [
        "code_reasoning",
        "repository",
    ]
    with pytest.raises(ValueError, match=r"--until reasons: no such stage; the stages are general"):
        job(until="reasons")


def test_what_does_not_fit_is_refused():
    """With the layout that would fit, before a script is written; so are GPUs that do not fill their nodes."""
    with pytest.raises(ValueError, match=r"needs .* GiB .*; use --gpus 128 --parallel.fsdp 128"):
        job("glm45_355b.py", gpus=64)
    engine = r"\.rl needs 708\.6 GiB .*; 664\.6 are the weights of an engine .*--rollout_engine URL, or .*--until"
    with pytest.raises(ValueError, match=engine):
        job(overrides=())
    assert job(overrides=(), until="long_agent").commands
    with pytest.raises(ValueError, match=r"do not fill nodes of 8; use --gpus 16 or 24"):
        check_nodes(20, 8)
    assert check_nodes(4, 8) == (1, 4)


@settings(max_examples=10)  # each starts two shells
@given(jobs())
def test_bash_can_parse_every_script(made):
    """So that each word arrives as it was given, whatever is in it."""
    for text in (torchrun_script(made), slurm_script(made, 1.0)):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert "--max-restarts 3" in text and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text
        assert words_after(text)[1:] == made.commands
        assert words_after(text)[0] == made.check


# Every option of sbatch that a script may use; a test with Slurm itself is below.
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "time", "signal"),
    *("requeue", "open-mode", "output", "partition", "account"),
}


def directives(text):
    """{name: value} of the lines that sbatch reads, which end at the first command."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def test_directives_of_slurm():
    """All stand before the first command, have known names, and say nodes, GPUs, limit, warning and requeue."""
    text = slurm_script(job(), 0.5, partition="gpu", account="me")
    assert text.count("#SBATCH") == len(directives(text)) and set(directives(text)) == SBATCH
    assert directives(text) | {
        "nodes": "64",
        "gpus-per-node": "8",
        "time": "30",
        "signal": "TERM@120",
        "partition": "gpu",
    } == directives(text)
    assert not {"partition", "account"} & set(directives(slurm_script(job(), 1.0)))
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text


@settings(max_examples=5)  # each reads the schema
@given(jobs())
def test_kubernetes_objects_keep_the_published_schema(made):
    """Each object is one that Kubernetes 1.30 takes, strictly; pods find one another by the Service's name."""
    validate = pytest.importorskip("kubernetes_validate")
    listed = json.loads(kubernetes_objects(made, "registry/image:1", "claim"))
    service, batch = listed["items"]
    for item in (service, batch):
        validate.validate(item, "1.30", strict=True)
    spec = batch["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["subdomain"] == service["metadata"]["name"]
    assert (
        service["spec"]["selector"].items()
        <= batch["spec"]["template"]["metadata"]["labels"].items()
    )
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == made.per_node
    script = container["command"][2]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert words_after(script)[1:] == made.commands


def test_a_broken_object_is_found():
    """The twin: a Job whose pods restart always."""
    validate = pytest.importorskip("kubernetes_validate")
    batch = json.loads(kubernetes_objects(job(), "i", "c"))["items"][1]
    batch["spec"]["complettions"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(batch, "1.30", strict=True)


def test_a_container_passes_the_signal_on(tmp_path):
    """Bash as the only process would keep SIGTERM for itself; the run must get it, to save."""
    text = json.loads(kubernetes_objects(job("mini.py"), "i", "c"))["items"][1]
    script = text["spec"]["template"]["spec"]["containers"][0]["command"][2]
    # In place of torchrun: a program that notes the signal.
    program = f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM; echo > {tmp_path}/started; sleep 60 & wait"
    (tmp_path / "python").write_text(f"#!/usr/bin/env bash\n{program}\n")
    (tmp_path / "python").chmod(0o755)
    process = subprocess.Popen(["bash", "-c", f"export PATH={tmp_path}:$PATH\n{script}"])
    wait_for(tmp_path / "started")
    process.terminate()
    assert process.wait(120) == 143 and (tmp_path / "saved").exists()


def wait_for(path, seconds=120.0):
    """Wait until a file is there."""
    import time

    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} is not there"
        time.sleep(0.05)


def test_the_verb_prints_or_writes_the_script(tmp_path, capsys):
    """The same text either way; Kubernetes needs to know its image; a mistake is one line."""
    config = str(CONFIGS / "flash_30b.py:h100x8")
    assert main(["launch", config, "--torchrun", *ENGINE]) == 0
    printed = capsys.readouterr().out
    script = tmp_path / "run.sh"
    assert main(["launch", config, "--torchrun", *ENGINE, "--script", str(script)]) == 0
    assert script.read_text() == printed and "--standalone" in printed
    capsys.readouterr()
    assert main(["launch", config, "--kubernetes", *ENGINE]) == 2
    assert "--image" in capsys.readouterr().err
    assert main(["launch", str(CONFIGS / "glm45_355b.py"), "--gpus", "8", "--slurm"]) == 2
    assert "use --gpus" in capsys.readouterr().err


def test_every_script_says_what_to_run_first():
    """The measurement of the links, which the script itself starts when it is asked to."""
    made = job()
    for text in (
        torchrun_script(made),
        slurm_script(made, 1.0),
        kubernetes_objects(made, "i", "c"),
    ):
        assert "MINGLM_CHECK" in text and "bench collectives" in text


has_slurm = shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged")


@pytest.mark.slow
@pytest.mark.skipif(not has_slurm, reason="needs slurmctld, slurmd and munge")
def test_slurm_runs_the_script(tmp_path):
    """A real Slurm of one node takes the script as it is and runs it; a job that fails late is queued again."""
    from helpers.slurm import single_node

    config = str(CONFIGS / "mini.py")
    text = slurm_script(job("mini.py", until="general"), 0.1)
    # In place of the program: one that writes down its words, and fails.
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit 1\n')
    program.chmod(0o755)
    with single_node(tmp_path) as slurm:
        environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "SECONDS": "301"}
        number = slurm.sbatch(text, environment)
        wait_for(tmp_path / "words")
        slurm.wait_until_job(number, "Restarts=1")
        words = (tmp_path / "words").read_text().split("\n")
    assert words[:2] == ["-m", "torch.distributed.run"] and config in words and "general" in words
