"""The benchmark of the kernels runs everywhere, tells what failed, and counts a share of the measured ceiling."""

import json

import pytest
import torch

from minglm.__main__ import main
from minglm.bench import kernels
from minglm.bench.case import Case
from minglm.bench.kernels import Schedule
from minglm.cli.figures import redraw
from minglm.kernels import dispatch
from minglm.kernels.toolchain.interpreter import switch_on

DEVICE = switch_on()


@pytest.mark.ci
def test_smoke_run_writes_every_form(tmp_path, capsys):
    """`bench kernels --smoke` measures every operation on a CPU: ours agrees with each baseline, times are positive."""
    path = tmp_path / "bench_kernels.json"
    words = ["bench", "kernels", "--smoke", "--device", "cpu", "--rounds", "2"]
    assert main([*words, "--out", str(path)]) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    drawn = path.with_suffix(".png").read_bytes()
    assert redraw([path]) == [path.with_suffix(".png")]
    assert path.with_suffix(".png").read_bytes() == drawn
    assert {case["operation"] for case in record["cases"]} == set(kernels.operations())
    for case in record["cases"]:
        for name, form in case["forms"].items():
            assert "error" not in form, f"{case['case']}: {name}: {form.get('error')}"
            # bfloat16.
            assert form["milliseconds"] > 0, f"{case['case']}: {name}"
            assert form["difference"] < 0.05, f"{case['case']}: {name}"


@pytest.mark.ci
def test_triton_forms_are_called_as_they_are_written(monkeypatch):
    """What a GPU would run as ours runs in the interpreter, and gives the baselines' results."""
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    operations = ("fp8", "grouped_product", "linear_cross_entropy", "norm", "router")
    for case in kernels.run(torch.device(DEVICE), operations, schedule=Schedule(1), smoke=True)[
        "cases"
    ]:
        for name, form in case["forms"].items():
            assert "error" not in form, f"{case['case']}: {name}: {form}"
            assert form["difference"] < 0.05, f"{case['case']}: {name}: {form}"


def test_a_failing_form_is_reported_and_the_others_are_measured():
    """A baseline that this machine lacks gives its reason; one that is wrong shows as a difference."""

    def absent():
        raise RuntimeError("no such kernel\nlong story")

    x = torch.ones(4)
    forms = {"ours": lambda: x, "absent": absent, "wrong": lambda: (2 * x,)}
    case = Case("case", 8.0, 4.0, lambda: forms)
    limits = {"bfloat16": 1e3, "bytes": 1e3}
    found = kernels.measure(case, limits, torch.device("cpu"), Schedule(3, 1.0))["forms"]
    assert found["absent"] == {"error": "RuntimeError: no such kernel"}
    assert found["wrong"]["difference"] == 1
    assert found["ours"]["times_ours"] == 1
    share = found["ours"]["share"] * found["ours"]["milliseconds"]
    # 8 operations at 1000 a second are 8 ms, more than 4 bytes' 4 ms.
    assert share == pytest.approx(8.0)


def test_without_a_gpu_it_is_one_clear_line(capsys):
    """A measurement of GPU kernels on a CPU is refused, with what can be done there."""
    assert main(["bench", "kernels", "--device", "cpu"]) == 2
    assert "found no GPU; --smoke" in capsys.readouterr().err


def test_triton_on_a_cpu_outside_the_interpreter_is_one_clear_line(monkeypatch, capsys):
    """Every form of ours would fail: refused before anything is measured."""
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["bench", "kernels", "--smoke", "--device", "cpu", "--kernels", "triton"]) == 2
    assert "needs a GPU; use --kernels auto, or TRITON_INTERPRET=1" in capsys.readouterr().err


def test_an_unknown_operation_is_one_clear_line(capsys):
    """--only with a name that is not there names those that are."""
    assert main(["bench", "kernels", "--smoke", "--only", "atention"]) == 2
    assert "no such operation; there are" in capsys.readouterr().err
