"""The report card: verdicts follow the log, figures are redrawn to the byte, and a killed run still has a report."""

import dataclasses
import json
import math
import re
from itertools import pairwise
from types import NoneType

import pytest
from helpers.fake_log import by_problem, evaluation, fake_log, interval, pathologies, stage_end
from helpers.package_map import field_docs
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.cli import figures
from minglm.cli.figures import redraw
from minglm.common.files import json_line
from minglm.common.log import Record
from minglm.common.mistakes import one_line
from minglm.config import ModelConfig, RunConfig, StagesConfig
from minglm.envs.twelve import TWELVE
from minglm.report import card, claims, curves, drawing
from minglm.report.records import (
    ORACLE,
    RECORDS,
    ConversationsRecord,
    CurriculumRecord,
    EvaluationRecord,
    Moment,
    OnPolicyRecord,
    PathologyRecord,
    RejectionRecord,
    RLRecord,
    SampleRecord,
    ScreeningRecord,
    StepRecord,
    TemperatureRecord,
    parse,
    read_records,
    select,
    stages_of,
)
from minglm.report.stages_diagram import draw_stages

LOG = fake_log()
STEP = select(LOG, StepRecord)[0]
RL = select(LOG, RLRecord)
RECORDS_MODULE = StepRecord.__module__
BRIEF = [record for record in LOG if getattr(record, "step", 0) < 2]  # fewer points to draw


def verdicts(records):
    """Return {claim function's name: verdict}."""
    return {claim.__name__: claim(records).verdict for claim in claims.CLAIMS}


def changed(kind, keep=lambda record: True, **values):
    """Return the made-up log with `values` set in the records of one kind that `keep` chooses."""
    return [
        dataclasses.replace(record, **values)
        if isinstance(record, kind) and keep(record)
        else record
        for record in LOG
    ]


def lines(records):
    """Return the records as the lines of a log."""
    return "".join(json.dumps({"kind": r.kind, **r.values()}) + "\n" for r in records)


def write_log(folder, records):
    """Store records as a run's log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text(lines(records), encoding="utf-8")
    return folder


def test_claims_of_the_made_up_log_are_met():
    """The made-up run shows everything a run must show."""
    assert set(verdicts(LOG).values()) == {"met"}


def test_scores_by_difficulty():
    """A difficulty's score is the mean of its problems, and the report says whether demonstrations show it."""
    log = changed(
        EvaluationRecord,
        lambda r: r.env == "instructions",
        by_problem=[1.0, 0.5, 0.0, None],
        levels=[1, 3, 3, 3],
        shown_shares={"1": 0.5, "2": 0.5},
    )
    rows = [row[1:] for row in card.level_rows(log) if row[0] == "instructions"]
    assert rows == [
        (1, "50.0%", 1, *["100.0%"] * 4),
        (3, "never shown", 3, *["25.0%"] * 4),
    ]


def scored(stage, env, score):
    """Return the made-up log with another score of a task after a stage."""
    low, high = interval(score, 200)
    return changed(
        EvaluationRecord,
        lambda r: (r.stage, r.env, r.thinking) == (stage, env, True),
        avg=score,
        low=low,
        high=high,
        by_problem=by_problem(score, 200),
    )


def after_pathology_rl(fault=0.03, flag=0.25, content=0.3):
    """Return the made-up log with other pathologies at its end."""
    record = pathologies("pathology_rl", Moment.AFTER, fault, flag, content)
    return changed(PathologyRecord, lambda r: r.when == Moment.AFTER, **record.values())


BROKEN = {
    # 0.38 is the cold start of instructions, 0.62 the expert
    "claim_gain": scored("chat.sft", "instructions", 0.525),
    "claim_control": scored("chat.control", "instructions", 0.621),
    # The base has 0.495, the expert 0.74, so 90% of the gain is 0.7155.
    "claim_kept": scored("unified", "retail", 0.715),
    "claim_calls": changed(
        EvaluationRecord,
        lambda r: (r.stage, r.env) == ("pathology_rl", "retail"),
        valid_calls=0.949,
    ),
    "claim_pathology": after_pathology_rl(fault=0.211),  # 0.42 before
    "claim_switch": changed(
        EvaluationRecord,
        lambda r: r.stage == "pathology_rl" and not r.thinking,
        switch_ok=0.999,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_claim_fails_alone(name):
    """Each claim turns to 'not met' when its own number misses the bound by little, and no other claim moves."""
    assert verdicts(BROKEN[name]) == {**verdicts(LOG), name: "not met"}


def test_a_gain_needs_a_task_beside_the_headline():
    """Instructions alone, or two other tasks alone, are not what the claim says."""
    cold_starts = {"arithmetic": "reasoning.sft", "retail": "agent.sft"}
    log = LOG
    for env, stage in cold_starts.items():
        expert = claims.find_score(log, stage.replace("sft", "rl"), env)
        better = dataclasses.replace(expert, stage=stage)
        log = [
            better
            if (r.kind, getattr(r, "env", ""), getattr(r, "stage", ""))
            == ("evaluation", env, stage)
            else r
            for r in log
        ]
    assert verdicts(log)["claim_gain"] == "not met"
    assert verdicts(scored("chat.rl", "instructions", 0.40))["claim_gain"] == "not met"


def test_rl_is_compared_with_the_better_start():
    """A base above its cold start is what RL has to beat."""
    log = scored("long_agent", "instructions", 0.55)
    (gain,) = [gain for gain in claims.gains(log) if gain.env == "instructions"]
    assert gain.start.stage == "long_agent"
    assert gain.over_start.mean == pytest.approx(0.62 - 0.55)
    assert verdicts(log)["claim_gain"] == "not met"


def test_an_expert_without_a_gain_has_nothing_to_keep():
    """A task on which the expert gained nothing is said, and does not decide the claim."""
    nothing = scored("agent.rl", "retail", 0.495)
    assert "retail: 49.5% (base), 49.5% (expert), 73.3%, no gain to keep" in (
        claims.claim_kept(nothing).measured
    )
    assert verdicts(nothing)["claim_kept"] == "met"


@pytest.mark.parametrize(
    ("name", "stage", "env"),
    [("claim_control", "chat.control", "instructions"), ("claim_kept", "unified", "retail")],
)
def test_a_claim_about_each_task_needs_each_measurement(name, stage, env):
    """Where the control of a task, or its score after unification, is missing, the others do not speak for it."""
    log = [r for r in LOG if (getattr(r, "stage", ""), getattr(r, "env", "")) != (stage, env)]
    assert verdicts(LOG)[name] == "met" and verdicts(log)[name] == "not measured"


def test_scores_that_cannot_be_paired_are_not_compared():
    """A log without scores by problem has no gains, and their claims are not measured."""
    old = changed(EvaluationRecord, by_problem=None)
    names = {"claim_gain", "claim_control", "claim_kept"}
    assert {name for name, v in verdicts(old).items() if v == "not measured"} == names
    assert not card.gain_rows(old) and not card.change_rows(old)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({"fault": 0.0}, "met"),
        ({"fault": 0.21}, "met"),
        ({"flag": 0.5}, "not met"),
        ({"content": 0.281}, "met"),
        ({"content": 0.279}, "not met"),
    ],
)
def test_faults_must_fall_for_other_detectors_too_and_content_must_stay(found, verdict):
    """To none, or to half; where the audit sees no fall, or the content loses more than 2 points, nothing is cured."""
    assert verdicts(after_pathology_rl(**found))["claim_pathology"] == verdict


def test_no_fault_before_is_no_fall():
    """From none to none is not met, and a log of other prompts, or of an older version, is not measured."""
    nothing = pathologies("any", Moment.BEFORE, 0.0, 0.5, 0.3).values()
    for name in ("stage", "when"):
        nothing.pop(name)
    assert verdicts(changed(PathologyRecord, **nothing))["claim_pathology"] == "not met"
    old = changed(PathologyRecord, lambda r: r.when == Moment.BEFORE, by_prompt=None)
    assert verdicts(old)["claim_pathology"] == "not measured"


def test_every_kind_of_prompt_has_a_row():
    """What mining found of it, then faults, flags and content; without records of it no table."""
    rows = card.pathology_rows(LOG)
    assert rows[0][:3] == ("provocation", "0 of 200", "42.0% to 3.0%")
    assert rows[1][:2] == ("constraints", "90 of 200")
    assert all(len(row) == len(card.PATHOLOGY_HEADER) for row in rows)
    assert not card.pathology_rows([])


def test_an_empty_log_claims_nothing():
    """Without records every claim is not measured, and no figure is drawn."""
    assert set(verdicts([]).values()) == {"not measured"}
    assert all(draw([], "nowhere.png") is None for draw in curves.FIGURES.values())


def test_tasks_that_the_run_never_learned_are_averaged_and_claimed_of_nothing():
    """Figure 1's twelve tasks are scored at the end: averages appear, and no verdict depends on what was not learned."""
    scored_before = {record.env for record in LOG if isinstance(record, EvaluationRecord)}
    others = [
        dataclasses.replace(
            evaluation("pathology_rl", env, "any", thinking, 0.5), valid_calls=0.1, switch_ok=0.2
        )
        for env in TWELVE
        if env not in scored_before
        for thinking in (True, False)
    ]
    assert card.group_rows(LOG) == []
    assert verdicts([*LOG, *others]) == verdicts(LOG)
    rows = card.group_rows([*LOG, *others])
    assert [row[1] for row in rows] == ["thinking", "direct"]
    learned = {
        record.env: record.avg
        for record in LOG
        if isinstance(record, EvaluationRecord)
        and record.stage == "pathology_rl"
        and record.thinking
    }
    twelve = [learned.get(env, 0.5) for env in TWELVE]
    assert rows[0][-1] == claims.percent(sum(twelve) / 12)


def test_the_finished_model_is_not_an_expert():
    """Before the experts are unified, claims about the finished model are not measured."""
    early = LOG[: next(i for i, r in enumerate(LOG) if isinstance(r, RejectionRecord))]
    names = {"claim_kept", "claim_calls", "claim_pathology", "claim_switch"}
    assert verdicts(early)["claim_control"] == "met"
    assert {name: v for name, v in verdicts(early).items() if v == "not measured"}.keys() == names


@given(st.integers(0, len(LOG)))
def test_report_of_a_killed_run(length):
    """A run killed after any record has a report."""
    text = card.markdown(LOG[:length])
    assert "## Claims" in text
    assert card.summary(LOG[:length])


@settings(max_examples=4)
@given(length=st.integers(1, len(LOG)))
def test_figures_of_a_killed_run(length, tmp_path_factory):
    """A run killed after any record has figures, and its report links exactly those drawn."""
    folder = write_log(tmp_path_factory.mktemp("run"), LOG[:length])
    card.write(folder)
    drawn = {path.stem for path in (folder / "figures").glob("*.png")}
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert drawn == {name for name in curves.FIGURES if f"(figures/{name}.png)" in text}


def test_whole_report_and_redrawing_to_the_byte(tmp_path):
    """A run's figures come from its log alone: drawn again elsewhere they are the same bytes."""
    first, second = (write_log(tmp_path / name, LOG) for name in ("first", "second"))
    assert "report.md" in card.write(first)
    drawn = redraw([second])
    assert len(drawn) == len(curves.FIGURES)
    for path in drawn:
        assert path.read_bytes() == (first / "figures" / path.name).read_bytes()
    text = (first / "report.md").read_text(encoding="utf-8")
    for word in (
        "abcdef012345",
        "2.13.0+cpu",
        "One seed",
        "MTP drafts accepted",
        "bits per byte",
        "13.5 minutes",
        "| rollout 0 | generate 75",
        "0: 25",
    ):
        assert word in text


def test_seeds_side_by_side(tmp_path):
    """A folder of logs of several seeds gives a table and two figures, which ignore no run."""
    folders = [tmp_path / str(count) for count in (1, 2, 3)]
    drawn = []
    for count, folder in enumerate(folders, 1):
        folder.mkdir()
        for seed in range(count):
            log = scored("chat.rl", "instructions", 0.62 - 0.1 * seed)
            scale = 1 - 0.2 * seed
            log = [
                dataclasses.replace(r, reward=scale * r.reward) if isinstance(r, RLRecord) else r
                for r in log
            ]
            (folder / f"seed{seed}.jsonl").write_text(lines(log), encoding="utf-8")
        drawn.append(redraw([folder]))
        assert [path.name for path in drawn[-1]] == ["claims.md", "gains.png", "rl.png"]
    for paths in zip(*drawn):
        assert len({path.read_bytes() for path in paths}) == 3
    table = drawn[2][0].read_text(encoding="utf-8")
    # 0.62 and 0.52 are ten points and more above the cold start's 0.38, 0.42 is not.
    assert re.search(r"RL gains 10 points .* \| 2 of 3 \|", table)
    assert re.search(r"tool calls .* \| 3 of 3 \|", table)


def test_a_step_without_reward_is_left_out_of_means_and_curves(tmp_path):
    """Where every environment failed nothing was measured: the means are those of the other steps."""
    first = [dataclasses.replace(r, stage="agent.rl", step=i) for i, r in enumerate(RL[:4])]
    failed = dataclasses.replace(
        first[0], step=4, reward=None, length=None, truncated=None, switch_ok=None
    )
    log = [*first, failed]
    measured, with_gap = card.rl_rows(first)[0], card.rl_rows(log)[0]
    assert with_gap[1] == measured[1] + 1
    assert with_gap[2:4] == measured[2:4]
    assert card.rl_rows([failed])[0][2:4] == ("n/a", "n/a")
    figures_of = [curves.draw_rl(part, tmp_path / f"{len(part)}.png") for part in (first, log)]
    assert figures_of[0].read_bytes() == figures_of[1].read_bytes()
    assert curves.draw_rl_seeds([log, first], tmp_path / "seeds.png")
    assert curves.draw_rl([failed], tmp_path / "failed.png")


@given(st.text("`~ab\n|", max_size=60))
def test_samples_stay_inside_their_fence(text):
    """No dialogue, whatever fences it writes, ends the block it is shown in."""
    shown = card.sample_text([SampleRecord(stage="unified", title="t", text=text)])
    lines = shown.split("\n")
    fence = lines[2]
    assert set(fence) == {"`"}
    assert [i for i, line in enumerate(lines) if line.startswith(fence)] == [
        2,
        3 + text.count("\n") + 1,
    ]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.floats(0.01, 0.5))
def test_running_mean_stays_in_range(values, share):
    """A running mean is as long as its series and never leaves its range."""
    means = drawing.running_mean(values, share)
    assert len(means) == len(values)
    # sums of 50 values of at most 1e3 round by less than 1e-9
    assert all(min(values) - 1e-9 <= mean <= max(values) + 1e-9 for mean in means)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=7), st.floats(0.02, 0.3))
def test_bands_tile_the_axis(counts, least):
    """Stages lie side by side in order, none narrower than the least width, and every step inside its own."""
    records = []
    for number, count in enumerate(counts):
        stage = f"s{number}"
        records += [dataclasses.replace(STEP, stage=stage, tokens=count * i) for i in (1, 2, 5)]
        records.append(stage_end(stage, seconds=1, tokens=count))
    placed = curves.bands(records, stages_of(records, StepRecord), least)
    edge = 0.0
    for stage, (left, right, _) in placed.items():
        assert left == edge
        assert right - left > least - 1e-9  # rounding of a sum of seven
        assert all(left < x < right + 1e-9 for x in curves.along(records, stage, placed[stage]))
        edge = right


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0.01, 0.5))
def test_labels_stand_apart_in_order(heights, least):
    """Labels never overlap, stay in the order of their lines, and stay put where there is room."""
    placed = drawing.spread(heights, least)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    gaps = [placed[b] - placed[a] for a, b in pairwise(order)]
    # Pushing converges geometrically; a tenth of a gap is not seen.
    assert all(gap > 0.9 * least for gap in gaps)
    if all(heights[b] - heights[a] >= least for a, b in pairwise(order)):
        assert placed == heights


@given(st.floats(1, 1e15))
def test_thousands_keep_three_figures(tokens):
    """A count of tokens is rounded by less than half a percent above a thousand, and to a whole number below."""
    number, _, unit = drawing.thousands(tokens).partition(" ")
    value = float(number) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]
    assert math.isclose(value, tokens, rel_tol=5e-3, abs_tol=0.5)


def test_redraw_runs_a_lessons_own_draw_and_refuses_the_rest(tmp_path, monkeypatch):
    """A lesson's log is drawn by the lesson; any other path is refused by name."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)  # the checkout whose lessons may run
    for name in ("lessons", "figures"):
        (tmp_path / name).mkdir()
    lesson = "from minglm.report.drawing import canvas\ndef draw(log):\n    return canvas(log['rows'])[0]\n"
    (tmp_path / "lessons" / "01_x.py").write_text(lesson, encoding="utf-8")
    log = tmp_path / "figures" / "01_x.json"
    log.write_text('{"rows": 2}', encoding="utf-8")
    assert redraw([log]) == [log.with_suffix(".png")]
    assert log.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"other\.json"):
        redraw([tmp_path / "figures" / "other.json"])
    with pytest.raises(ValueError, match=r"no log\.jsonl"):
        redraw([tmp_path])


def test_the_stages_are_drawn_from_the_config(tmp_path):
    """The picture of the stages shows another config's numbers: it is drawn and not stored."""
    pictures = []
    for tokens in (1_000_000, 2_000_000):
        general = dataclasses.replace(StagesConfig().general, tokens=tokens)
        run = RunConfig("x", ModelConfig(), dataclasses.replace(StagesConfig(), general=general))
        pictures.append(draw_stages(run, tmp_path / f"{tokens}.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_on_policy_distillation_is_a_row():
    """Its steps, tokens, and the distance from the experts in the first and last five steps; nothing without such a stage."""
    steps = [
        OnPolicyRecord(
            stage="unified",
            step=number + 1,
            tokens=1000 * (number + 1),
            reverse_kl=(9 - number) / 10,
            grad_norm=1.0,
            seconds=1.0,
        )
        for number in range(10)
    ]
    assert card.on_policy_rows(LOG) == []
    assert card.on_policy_rows(steps) == [("unified SFT", 10, "10 k", "0.700", "0.200")]
    assert "## On-policy distillation" in card.markdown([*LOG, *steps])


def test_every_row_has_a_cell_for_each_column():
    """No table of the whole report has a row longer or shorter than its header."""
    tables = [
        block.split("\n") for block in card.markdown(LOG).split("\n\n") if block.startswith("|")
    ]
    assert len(tables) > 6
    for table in tables:
        widths = {len(re.sub(r"\\\|", "", line).split("|")) for line in table if line}
        assert len(widths) == 1, table[0]


def test_the_report_says_what_became_of_the_documents():
    """Counts of what was left out and why, and of records that could not be used, with the log that names them."""
    rows = dict(card.cleaning_rows(LOG))
    assert rows == {
        "used, repetitions included": "9,000",
        "exact copies, left out": "3",
        "evaluation items in them, left out": "18",
        "near duplicates, left out": "5",
        "lowest quality, left out": "7",
        "best quality, repeated": "8",
        "records that could not be used, named in data/documents/skipped.log": "11",
    }


def test_tables_escape_bars():
    """A bar inside a cell is text and not the end of the cell."""
    assert card.table(("a",), [("x|y",)]).splitlines()[-1] == "| x\\|y |"


def test_a_log_reads_back_as_it_was_written(tmp_path):
    """Every record of a log is read as the dataclass it was written from."""
    assert read_records(write_log(tmp_path, LOG) / "log.jsonl") == LOG
    assert {type(record) for record in LOG} <= set(RECORDS.values())


def kinds_of(record):
    """Return the dataclasses of records that inherit from one."""
    children = [child for child in record.__subclasses__() if child.__module__ == RECORDS_MODULE]
    found = [kind for kind in children if "kind" in vars(kind)]
    return found + [kind for child in children for kind in kinds_of(child)]


def test_every_kind_of_record_is_read_back():
    """No dataclass of a record is written by a run and unknown to its report."""
    assert set(kinds_of(Record)) == set(RECORDS.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_field_of_another_type_is_named(data):
    """Any JSON in the place of a field is either of the field's type, and read, or refused in one line with its name."""
    record = data.draw(st.sampled_from(LOG))
    name = data.draw(st.sampled_from(sorted(record.values())))
    value = data.draw(JSON)
    values = {"kind": record.kind, **record.values(), name: value}
    try:
        read = getattr(parse(values), name)
    except ValueError as error:
        assert f"log record {record.kind!r}: {name} = " in one_line(str(error))
    else:
        assert read is value
        assert type(value) in (type(getattr(record, name)), int, float, dict, list, NoneType)


@settings(max_examples=8)  # what is read is drawn, which takes a second
@given(st.data())
def test_a_damaged_log_is_drawn_or_named(tmp_path_factory, data):
    """Whatever JSON stands in a field, `figures` draws the log or says in one line which file to restore."""
    folder = tmp_path_factory.mktemp("run")
    place = data.draw(st.integers(0, len(BRIEF) - 1))
    record = BRIEF[place]
    name = data.draw(st.sampled_from(sorted(record.values())))
    values = {"kind": record.kind, **record.values(), name: data.draw(JSON)}
    lines = [{"kind": other.kind, **other.values()} for other in BRIEF]
    lines[place] = values
    (folder / "log.jsonl").write_bytes(b"".join(map(json_line, lines)))
    try:
        assert redraw([folder])
    except ValueError as error:
        assert str(folder / "log.jsonl") in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rl", {"spans": [["trainer", "sleep", 0.0, 1.0], ["rollout 0", "generate", 0.0, 1.0]]}),
        ("pathology", {"incidence": {}}),
        ("stage_end", {"tokens": 10**400}),
    ],
)
def test_what_no_type_forbids_is_named_too(tmp_path, kind, changes):
    """A phase that is none, no counts, a number beyond all floats: one line with the file."""
    lines = [{"kind": record.kind, **record.values()} for record in BRIEF]
    last = max(place for place, line in enumerate(lines) if line["kind"] == kind)
    lines[last] |= changes
    (tmp_path / "log.jsonl").write_bytes(b"".join(map(json_line, lines)))
    with pytest.raises(ValueError, match=r"log\.jsonl holds what this version does not write"):
        card.write(tmp_path)


def test_every_field_of_a_record_is_explained():
    """The schema is the documentation: no field is without its docstring."""
    for kind in RECORDS.values():
        fields = {field.name for field in dataclasses.fields(kind)}
        assert field_docs(kind).keys() == fields, kind


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"kind": "weather"}, "unknown kind 'weather'"),
        ({"kind": "end"}, "missing 1 required keyword-only argument: 'seconds'"),
        ({"kind": "end", "seconds": 1, "hours": 2}, "unexpected keyword argument 'hours'"),
    ],
)
def test_records_of_another_version_are_refused_in_one_line(record, reason):
    """A record that is not declared is refused by its name, and no field is dropped in silence."""
    with pytest.raises(ValueError, match=reason) as error:
        parse(record)
    assert "written by another version" in str(error.value) and "\n" not in str(error.value)


def test_each_probe_of_the_temperature_is_a_row():
    """Which step, every temperature with its score, those shown to be safe, and what followed; without probes no table."""
    probe = TemperatureRecord(
        stage="chat_rl",
        step=40,
        before=1.0,
        after=1.1,
        verdict="raised",
        probed=[[1.0, 0.5, 0.01], [1.1, 0.52, -0.002], [1.2, 0.4, 0.1]],
        problems=300,
        seconds=1.0,
    )
    kept = dataclasses.replace(probe, after=1.0, verdict="kept")
    first, second = card.temperature_rows([probe, kept])
    assert first[1:] == (
        40,
        300,
        "1: 50.0%, 1.1: 52.0%, 1.2: 40.0%",
        "1.1",
        "raised: 1 to 1.1",
    )
    assert second[-1] == "kept: 1"
    assert card.TEMPERATURE_HEADER[1] in card.markdown([*LOG, probe])
    assert card.TEMPERATURE_HEADER[1] not in card.markdown(LOG)


def test_a_curriculum_shows_its_tiers_and_its_checks():
    """Problems by tier, how they were measured, and every score of the held-out ones; without a curriculum no table."""
    screening = ScreeningRecord(
        stage="chat_rl",
        tiers={"moderate": 12, "extreme": 5, "solved": 70, "unsolved": 9, "between": 4},
        answers=4800,
        pass_rate=[0.74, 0.66, 0.8],
        extreme_rate=None,
        held_out=11,
        seconds=3.0,
    )
    check = CurriculumRecord(
        stage="chat_rl",
        step=30,
        score=0.3,
        before=0.5,
        verdict="fallen",
        problems=11,
        seconds=1.0,
    )
    (row,) = card.screening_rows([screening])
    assert row[1:] == (12, 5, 70, 9, 4, "4,800", "74.0% (66.0% to 80.0%)", "none", 11)
    assert len(row) == len(card.SCREENING_HEADER)
    (row,) = card.curriculum_rows([check])
    assert row[1:] == (30, "30.0%", "50.0%", "fallen")
    page = card.markdown([*LOG, screening, check])
    assert "score of the held-out" in page and "second draw" in page
    assert "score of the held-out" not in card.markdown(LOG)


def test_the_report_shows_the_share_of_each_environment():
    """What is left of the answers has a column for each; what is learned has the tokens, where the log knows them."""
    lines = card.markdown(LOG).splitlines()
    assert "| answers | reasoning, code | agent, retail |" in lines
    assert "| correct | 1,300 | 12 |" in lines
    assert any(line.endswith("| code | 900 | 60 k | 25.0% | 0 |") for line in lines)
    assert any(line.endswith("| retail | 800 | 180 k | 75.0% | 35 |") for line in lines)
    old = ConversationsRecord(stage="unified", examples={"code": 9}, too_long={})
    ((_, *cells),) = card.conversations_rows([old])
    assert cells == ["code", "9", "", "", "0"]


def test_answers_of_the_oracle_are_said():
    """With its count, and with the expert whose answers were all wrong; nothing where the experts answered everything."""
    counts = {f"agent, gym:x: {ORACLE}": 12, f"chat: {ORACLE}": 0}
    page = card.markdown([*LOG, RejectionRecord(counts=counts)])
    assert f"**12 {ORACLE}: expert `agent, gym:x`.**" in page and f"**0 {ORACLE}" not in page
    assert ORACLE not in card.markdown(LOG)
