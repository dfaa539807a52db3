"""The page of a run: what it reads of the folder, and what a person sees in a browser, with keys and on a phone."""

import json
import threading
from contextlib import contextmanager

import pytest
import torch
from helpers.browser import Page, browser, needs_browser
from helpers.scripted import byte_tokenizer

from minglm.cli.main import main
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Score, ScoreStatus, assistant
from minglm.report.run_view import MOST_POINTS, RunView, static_page, thinned
from minglm.rl.episode import Segment, Trajectory
from minglm.rl.samples import GroupKey, SampleFile
from minglm.serve.formats import as_json
from minglm.serve.listener import serve
from minglm.serve.view import create_view_app

TOKENIZER = byte_tokenizer()
STEPS = 3
EVIL = "</script><img src=x onerror=boom()>é"


def sample(step, reward, environment="retail"):
    """Return a trajectory whose answer is hostile to a page, with everything that a sample may have."""
    task = ENVIRONMENTS[environment].task(step, 1)
    prompt, answer = TOKENIZER.encode("what?"), TOKENIZER.encode(EVIL)
    segment = Segment.prompt(prompt)
    for at, token in enumerate(answer):
        segment.tokens.append(token)
        segment.mask.append(True)
        segment.logprobs.append(-0.25 * (at + 1))
        segment.versions.append(step)
    segment.trainer_logprobs = [p - 0.125 for p in segment.logprobs]
    S = len(segment.tokens)
    segment.experts_SLK = torch.arange(S * 2 * 2, dtype=torch.uint8).reshape(S, 2, 2)
    message = assistant(EVIL, None, [("get_order", {"order_id": 317})])
    status = ScoreStatus.OK if reward == 1 else ScoreStatus.WRONG
    t = Trajectory(task, True, [*task.messages, message], [segment])
    t.score = Score(reward, status, {"state": reward})
    t.advantage = reward - 0.5
    return t


def write_samples(folder, steps, stage="agent.rl"):
    """Append the samples of these steps: two of the shop, one right and one wrong, and a sum."""
    file = SampleFile(folder / "samples" / f"{stage}.jsonl", {"stage": stage})
    for step in steps:
        groups = [[sample(step, 1.0), sample(step, 0.0)], [sample(step, 0.5, "arithmetic")]]
        file.write([GroupKey(step, 0, place) for place in (0, 1)], groups)


def spans(step):
    """Return who did what when in a step of ten seconds: the engine for six of them, the trainer for five."""
    began = 1000.0 + 10 * step
    return [
        ["rollout 0", "generate", began, began + 6],
        ["rollout 0", "environment", began + 4, began + 8],
        ["trainer", "train", began + 4, began + 8],
        ["trainer", "publish", began + 9, began + 10],
    ]


def log(folder, *records):
    """Append records to the run's log."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run under way: one stage done, one with samples."""
    folder = tmp_path / "toy"
    (folder / "data").mkdir(parents=True)
    TOKENIZER.save(folder / "data" / "tokenizer.json")
    log(
        folder,
        {"kind": "start", "name": "toy"},
        {"kind": "stage_begin", "stage": "general", "teaches": "prose"},
    )
    for step in range(1, 11):
        load = {"load_max_over_mean": [1.5, 2.0 + step / 10], "load_entropy": [0.9, 0.8]}
        log(folder, {"kind": "step", "stage": "general", "step": step, "loss": 8 / step, **load})
    log(folder, {"kind": "stage_end", "stage": "general", "tokens": 1, "seconds": 12.5})
    log(folder, {"kind": "bits_per_byte", "stage": "general", "source": "prose", "value": 2.5})
    log(folder, {"kind": "stage_begin", "stage": "agent.rl", "teaches": "GRPO"})
    log(
        folder,
        *(
            {"kind": "rl", "stage": "agent.rl", "step": s + 1, "reward": 0.5, "spans": spans(s)}
            for s in range(STEPS)
        ),
    )
    write_samples(folder, range(STEPS))
    return folder


def test_what_is_read_of_a_run(run):
    """Stages, curves, loads and samples are the log's; what is appended later is read on from there, a cut log anew."""
    view = RunView(run)
    first = view.overview()
    assert [(s["name"], s["done"]) for s in first["stages"]] == [
        ("general", True),
        ("agent.rl", False),
    ]
    assert first["curves"]["general"]["loss"] == [8 / step for step in range(1, 11)]
    assert (
        first["loads"]["general"]["load_max_over_mean"][0] == [1.5, 2.1]
        and first["loads"]["agent.rl"] == {}
    )
    line = first["time_lines"]["agent.rl"]
    assert first["time_lines"]["general"] == {} and line["lanes"] == ["trainer", "rollout 0"]
    assert line["steps"] == [1, STEPS] and line["spans"][-1] == [0, "publish", 29.0, 30.0]
    assert line["busy"] == [
        {"train": 0.4, "publish": 0.1, "idle": 0.5},
        {"generate": 0.6, "environment": 0.4, "idle": 0.2},
    ]
    assert first["samples"] == {"agent.rl": 3 * STEPS} and first["scores"][0]["value"] == 2.5
    rows = view.samples("agent.rl")
    assert [row["reward"] for row in rows[:3]] == [1.0, 0.0, 0.5] and rows[0]["calls"] == 1
    one = view.sample("agent.rl", 4)
    tokens = one["segments"][0]["tokens"]
    assert "".join(token[0] for token in tokens if token[1] is None) == "what?"
    sampled = [token for token in tokens if token[1] is not None]
    assert [token[1:] for token in sampled] == [
        [-0.25 * n, -0.25 * n - 0.125, 1] for n in range(1, len(sampled) + 1)
    ]
    assert one["segments"][0]["experts"][1] == [[4, 5], [6, 7]] and one["advantage"] == -0.5

    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "rl", "stage": "agent.rl", "step": 4, ')  # still being written
    assert view.overview() == first
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('"reward": 1.0}\n')
    write_samples(run, [STEPS])
    later = view.overview()
    assert later["curves"]["agent.rl"]["reward"] == [0.5, 0.5, 0.5, 1.0]
    assert later["samples"] == {"agent.rl": 3 * STEPS + 3} and RunView(run).overview() == later
    (run / "log.jsonl").write_text('{"kind": "start", "name": "again"}\n', encoding="utf-8")
    assert view.overview()["name"] == "again" and view.overview()["stages"] == []


def test_mistakes(run, tmp_path, capsys):
    """A folder without a log, a stage without samples and a number too high: one line each."""
    assert main(["view", str(tmp_path)]) == 2
    assert "holds no log.jsonl" in capsys.readouterr().err
    for stage, number in (("general", 0), ("../data/x", 0), ("agent.rl", 99)):
        with pytest.raises(ValueError, match=r"no sample"):
            RunView(run).sample(stage, number)


DAMAGED = {
    "log.jsonl": [
        *("42", "null", "[]", "[" * 10**5, '{"kind": "rl", "stage": ["a"]}', '{"kind": []}'),
        '{"kind": "rl", "stage": "agent.rl", "step": 4, "reward": NaN, "loss": -Infinity}',
        '{"kind": "rl", "stage": "agent.rl", "step": 4, "spans": [[1]]}',
    ],
    "samples/agent.rl.jsonl": [
        *(
            "42",
            "null",
            '{"segments": 5}',
            '{"segments": [{}]}',
            '{"segments": [{"logprobs": [0]}]}',
        ),
        '{"segments": [{"tokens": [1], "logprobs": [-Infinity]}], "messages": [{"content": "\\ud800"}]}',
    ],
}


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name, lines in DAMAGED.items() for line in lines]
)
def test_a_damaged_line_is_passed_over_or_named(run, name, line):
    """Both pages show the rest, or say in one line which file is damaged; what they show is JSON."""
    with open(run / name, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    view = RunView(run)
    try:
        as_json(view.overview())
        for number in range(len(view.samples("agent.rl"))):
            as_json(view.sample("agent.rl", number))
        assert "NaN" not in static_page(RunView(run)).encode().decode()
    except ValueError as error:
        assert f"{run / name} holds what this version does not write" in str(
            error
        ) and "\n" not in str(error)


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 10 * MOST_POINTS + 7])
def test_curves_keep_the_last_step(count):
    """However many steps: at most so many points, in order, and the last one."""
    steps = [{"step": n} for n in range(count)]
    chosen = thinned(steps)
    assert (
        len(chosen) <= MOST_POINTS
        and chosen[-1:] == steps[-1:]
        and chosen == sorted(chosen, key=steps.index)
    )


@contextmanager
def shown(run):
    """Yield the URL of the live page."""
    app = create_view_app(RunView(run))
    found, ready = [], threading.Event()
    thread = threading.Thread(
        target=serve,
        args=(app,),
        kwargs={"port": 0, "ready": lambda url: (found.append(url), ready.set())},
        daemon=True,
    )
    thread.start()
    assert ready.wait(60)
    try:
        yield found[0]
    finally:
        app.state.server.should_exit = True
        thread.join(60)


def walk(page):
    """Do what a person does on either page: look at curves and experts, filter samples, choose tokens with keys."""
    assert page.shows("#name", "toy") and page.shows("#state", "in stage agent.rl")
    assert page.shows("#caption", "loss: last 0.8 at step 10") and page.shows(
        "#scores", "bits_per_byte"
    )
    page.click("nav button[data-view=experts]")
    assert page.shows("#load-caption", "Last step: 1.5, 3")
    page.click("nav button[data-view=time]")
    assert page.shows("#time-caption", "Steps 1 to 3, 30 seconds.")
    assert page.shows("#busy", "idle 50%") and page.shows("#lanes", "rollout 0")
    assert page.run("return document.querySelectorAll('#lanes rect.generate').length") == STEPS
    page.click("nav button[data-view=samples]")
    assert page.shows("#rows", "step 3") and len(page.all("#rows button")) == 3 * STEPS
    page.run("document.getElementById('sample-stage').onchange()")  # the same stage again
    assert page.shows("#rows", "step 3")
    page.run(
        "document.getElementById('sample-reward').value = 'right'; document.getElementById('sample-reward').onchange()"
    )
    assert len(page.all("#rows button")) == STEPS
    page.run(
        "document.getElementById('sample-task').value = 'retail'; document.getElementById('sample-task').onchange()"
    )
    page.find("body").send_keys("j")  # the first that fits
    assert page.shows("#about", "reward 1 (ok), advantage 0.5; state 1") and page.shows(
        "#calls", "get_order"
    )
    assert page.shows(".tokens", EVIL), "what the model wrote is text"
    page.run(
        "document.getElementById('colour').value = 'gap'; document.getElementById('colour').onchange()"
    )
    assert (
        page.run("return document.querySelectorAll('.tokens span[style*=background]').length") > 10
    )
    page.find(".tokens").send_keys(
        "\ue014" * 7
    )  # the right arrow, to the second token of the answer
    assert page.shows(
        "#token", "log-probability -0.5, the trainer's -0.625, gap -0.125, weights of version 0"
    )
    assert page.all(".routing i") == ["24", "25", "26", "27"]


@needs_browser
def test_the_page_live_and_as_a_file(run, tmp_path):
    """Both are walked through with keys; the live one follows the run, and neither is wider than a phone or at fault."""
    file = tmp_path / "run.html"
    assert main(["view", str(run), "--html", str(file)]) == 0
    with browser(tmp_path / "profile") as driver, shown(run) as url:
        for address in (file.as_uri(), url):
            page = Page(driver, address)
            walk(page)
            page.look_like(390, "dark")
            for view in ("curves", "experts", "time", "samples"):
                page.click(f"nav button[data-view={view}]")
                assert page.run("return document.documentElement.scrollWidth <= innerWidth"), view
            page.look_like(1100, "light")
            assert page.faults() == []
        write_samples(run, [STEPS])
        log(run, {"kind": "end"})
        assert page.shows("#state", "finished") and page.shows(
            "#sample-stage option", f"({3 * STEPS + 3})"
        )


def test_a_static_page_holds_nothing_from_outside(run):
    """No address of another machine, and no end of the script in what the model wrote."""
    page = static_page(RunView(run))
    assert page.count("</script>") == 2 and "boom()" in page
    assert (
        "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    )
