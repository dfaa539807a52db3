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


def main(args: argparse.Namespace) -> None:
    """Redraw the figures and print their paths."""
    for path in redraw(args.paths or default_paths()):
        print(path)


def default_paths() -> list[Path]:
    """Return everything under figures/ that can be redrawn, and the toy config for the picture of its stages."""
    figures = Path("figures")
    seed_folders = sorted({log.parent for log in figures.glob("*/seed*.jsonl")})
    return [*sorted(figures.glob("*_*.json")), *seed_folders, ROOT / "configs" / "toy.py"]


def redraw(paths: Iterable[str | Path]) -> list[Path]:
    """Redraw figures from what is stored; return the paths of the PNGs. Raises ValueError for any other path.

    A run folder: its figures, from its log. A lesson's log `NN_name.json`: with `draw(log)` of this checkout's
    `lessons/NN_name.py`. A benchmark's record `bench_NAME.json`. A config `configs/NAME.py`: the picture of its stages,
    `figures/stages.png`. A folder of logs `seedN.jsonl`, runs of one config: `rl.png`, its reinforcement curves over
    the seeds.
    """
    drawn: list[Path] = []
    for path in map(Path, paths):
        drawn += _redraw(path)
    return drawn


def _redraw(path: Path) -> list[Path]:
    """Redraw the figures of one path."""
    from minglm.common.files import read_object
    from minglm.config import load_config
    from minglm.recipe.folder import check_log
    from minglm.report.card import draw_all
    from minglm.report.curves import draw_rl_seeds
    from minglm.report.drawing import save
    from minglm.report.records import read_records
    from minglm.report.stages_diagram import draw_stages

    lesson = ROOT / "lessons" / f"{path.stem}.py"
    seed_logs = sorted(path.glob("seed*.jsonl"))
    if seed_logs:
        curves = path / "rl.png"
        draw_rl_seeds([read_records(log) for log in seed_logs], curves)
        return [curves]
    if path.is_dir():
        check_log(path)  # figures of all records are not replaced by those of fewer
        return [path / "figures" / f"{name}.png" for name in draw_all(path)]
    if path.suffix == ".json" and path.is_file() and lesson.is_file():
        draw = runpy.run_path(str(lesson))["draw"]
        figure = draw(read_object(path))
        picture = path.with_suffix(".png")
        save(figure, picture)
        return [picture]
    if path.name.startswith("bench_") and path.suffix == ".json" and path.is_file():
        from minglm.bench import plots

        return [plots.redraw(path)]
    if path.suffix == ".py" and path.is_file():
        stages = path.parent.parent / "figures" / "stages.png"
        draw_stages(load_config(path), stages)
        return [stages]
    raise ValueError(
        f"cannot redraw {path}: give a run folder, a folder of seedN.jsonl, figures/*.json or a config"
    )
