"""Redraw figures from what is stored: the verb `figures`."""

import argparse
import runpy
from collections.abc import Iterable
from pathlib import Path

import minglm
from minglm.cli import arguments

ROOT = Path(minglm.__file__).parent.parent
"""The checkout: its lessons draw their logs. Code that lies beside a path is never run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `figures`."""
    parser.add_argument(
        "paths", type=arguments.path, nargs="*", help="default: everything under figures/"
    )
    parser.add_argument(
        "--scores",
        metavar="FILE",
        type=arguments.file,
        help="draw the scores of these run folders over parameters and seconds to this PNG, and nothing else",
    )


def main(args: argparse.Namespace) -> None:
    """Redraw the figures and print the paths written."""
    if args.scores is not None:
        print(compare(args.paths, args.scores))
        return
    for path in redraw(args.paths or default_paths()):
        print(path)


def compare(folders: Iterable[str | Path], picture: str | Path) -> Path:
    """Draw the scores of run folders over parameters and seconds.

    Raises ValueError, in one line, as `draw_score_map`.
    """
    from minglm.plan.counts import count_parameters
    from minglm.recipe.folder import check_log, stored_run
    from minglm.report.card import read_run
    from minglm.report.score_map import ScoredRun, draw_score_map

    runs = []
    for folder in map(Path, folders):
        check_log(folder)
        records = read_run(folder)
        parameters = count_parameters(stored_run(folder).config.model)["total"]
        runs.append(ScoredRun(folder.resolve().name, parameters, records))
    if not runs:
        raise ValueError("--scores: name the folders of the runs to compare")
    return draw_score_map(runs, picture)


def default_paths() -> list[Path]:
    """Return everything under figures/ that can be redrawn, and the toy config for the picture of its stages."""
    figures = Path("figures")
    folders = {log.parent for log in figures.glob("*/seed*.jsonl")}
    folders |= {log.parent.parent for log in figures.glob("*/*/log.jsonl")}
    return [*sorted(figures.glob("*_*.json")), *sorted(folders), ROOT / "configs" / "toy.py"]


def redraw(paths: Iterable[str | Path]) -> list[Path]:
    """Redraw figures from what is stored; return the paths written. Raises ValueError for any other path.

    A run folder: its figures, from its log. A lesson's log `NN_name.json`: with `draw(log)` of this
    checkout's `lessons/NN_name.py`. A benchmark's record `bench_NAME.json`. A config `configs/NAME.py`: the
    picture of its stages, `figures/stages.png`. A folder of logs `seedN.jsonl`, runs of one config: what the
    seeds show side by side (`minglm.report.seeds`). A folder of run folders: their scores, to `scores.png` in
    it.
    """
    drawn: list[Path] = []
    for path in map(Path, paths):
        drawn += _redraw(path)
    return drawn


def _redraw(path: Path) -> list[Path]:
    """Redraw the figures of one path."""
    from minglm.common.files import read_object
    from minglm.common.mistakes import read_from
    from minglm.config import load_config
    from minglm.recipe.folder import check_log
    from minglm.report import seeds
    from minglm.report.card import draw_all
    from minglm.report.drawing import save
    from minglm.report.stages_diagram import draw_stages

    lesson = ROOT / "lessons" / f"{path.stem}.py"
    if any(path.glob("seed*.jsonl")):
        return seeds.redraw(path)
    runs = sorted(log.parent for log in path.glob("*/log.jsonl"))
    if runs:
        return [compare(runs, path / "scores.png")]
    if path.is_dir():
        check_log(path)  # figures of all records are not replaced by those of fewer
        return [path / "figures" / f"{name}.png" for name in draw_all(path)]
    if path.suffix == ".json" and path.is_file() and lesson.is_file():
        draw = runpy.run_path(str(lesson))["draw"]
        picture = path.with_suffix(".png")
        with read_from(path):
            save(draw(read_object(path)), picture)
        return [picture]
    if path.name.startswith("bench_") and path.suffix == ".json" and path.is_file():
        from minglm.bench import plots

        with read_from(path):
            return [plots.redraw(path)]
    if path.suffix == ".py" and path.is_file():
        stages = path.parent.parent / "figures" / "stages.png"
        draw_stages(load_config(path), stages)
        return [stages]
    raise ValueError(
        f"cannot redraw {path}: give a run folder, a folder of seedN.jsonl, figures/*.json or a config"
    )
