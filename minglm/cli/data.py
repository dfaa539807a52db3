"""The verb `data`: build the token shards of a config, and tell what is in them (paper 2.2).

    source   documents   tokens   text   bytes a token, of the training shards, and held-out tokens
    what each step of cleaning took, and the records that could not be used
    samples: the first tokens of documents drawn at random, as text again

Simplified: the bytes of text of a source count a repeated document as often as it is used.
"""

import argparse
import json
import random
from pathlib import Path

from minglm.cli.arguments import add_config

SHOWN = 240
"""Characters of a sample."""


def table(rows):
    """Rows of a table, the first its head, as lines of text; numbers stand to the right."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [
            cell.ljust(w) if at == 0 else cell.rjust(w)
            for at, (cell, w) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    return ["  ".join(line).rstrip() for line in lines]


def stock(folder):
    """Everything that is known of the shards under `folder`, as plain values."""
    from minglm.data.store import shards

    about = json.loads((folder / "about.json").read_text())
    found = {part: shards.totals(folder / part) for part in ("train", "heldout")}
    return {
        **found,
        **{
            name: about[name]
            for name in ("documents", "cleaning", "skipped", "skipped_log", "seconds")
        },
    }


def render(found):
    """The stock as lines of text."""
    rows = [["source", "documents", "tokens", "bytes of text", "bytes a token", "held-out tokens"]]
    for source, row in found["train"].items():
        held = found["heldout"].get(source, {"tokens": 0})["tokens"]
        rate = f"{row['bytes'] / row['tokens']:.2f}" if row["tokens"] else "-"
        rows.append([source, row["documents"], row["tokens"], row["bytes"], rate, held])
    total = [sum(row[at] for row in rows[1:]) for at in (1, 2, 3)]
    held = sum(row[5] for row in rows[1:])
    lines = [*table([*rows, ["all", *total, f"{total[2] / max(1, total[1]):.2f}", held]]), ""]
    steps = [["cleaning", "documents", "of which"]]
    for step, taken in found["cleaning"].items():
        taken = taken.get("removed", taken) if step == "decontamination" else taken
        if step == "judges":
            continue
        parts = {} if isinstance(taken, int) else taken
        many = ", ".join(f"{name} {count:,}" for name, count in parts.items())
        steps.append(
            [step.replace("_", " "), taken if isinstance(taken, int) else sum(parts.values()), many]
        )
    lines += [
        f"{a}  {b}" if b else a
        for a, b in zip(table([s[:2] for s in steps]), [s[2] for s in steps], strict=True)
    ]
    for kind, judge in found["cleaning"].get("judges", {}).items():
        before, after = judge["calibration_error"]
        lines.append(
            f"quality of {kind}: learned from {judge['documents']} marks, correlation {judge['correlation']}, "
            f"calibration error {before} before and {after} after calibration"
        )
    lines.append(
        f"{found['skipped']:,} records could not be used"
        + (f"; see {found['skipped_log']}" if found["skipped"] else "")
    )
    return lines


def samples(train, tokenizer, count, seed=0):
    """`count` documents of each source, drawn at random: lines of text."""
    rng = random.Random(seed)
    for source, documents in train.items():
        for index in sorted(rng.sample(range(len(documents)), min(count, len(documents)))):
            text = tokenizer.decode(documents[index][:SHOWN])[:SHOWN]
            yield f"\n{source}, document {index:,}, {len(documents[index]):,} tokens"
            yield from (f"    {line}" for line in text.splitlines()[:6])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data`."""
    add_config(parser)
    parser.add_argument("--out", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--executor",
        default="local",
        choices=["local", "ray"],
        help="local processes, or stages of Ray Data",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every shard and compare its checksum"
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="show N documents of each source"
    )
    parser.add_argument(
        "--skipped", type=int, default=3, metavar="N", help="show N records that could not be used"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument(
        "--dry-run", action="store_true", help="print where the shards would be, read nothing"
    )


def main(args: argparse.Namespace) -> None:
    """Build the token shards of CONFIG where they are missing; print what is in them and what cleaning took."""
    from minglm.common.files import read_jsonl
    from minglm.config import load_config
    from minglm.data.build import prepare
    from minglm.data.store import shards
    from minglm.data.workers import Executor
    from minglm.recipe.solutions import task_data

    run = load_config(args.config, args.overrides)
    folder = Path(args.out or f"runs/{run.name}") / "data"
    splits = [folder / "train", folder / "heldout"]
    if args.dry_run:
        built = all(shards.index(split) is not None for split in splits)
        state = "are" if built else "would be"
        print(f"the shards of {run.name}, config {run.hash()}, {state} in {folder}")
        return
    if args.verify:
        for split in splits:
            for number, wrong in shards.damaged(split, verify=True).items():
                print(f"{wrong}; it is built again")
                shards.forget(split, number)
    tokenizer, train, _, _ = prepare(run, folder, task_data(run), Executor(args.executor))
    found = stock(folder)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    print(*render(found), sep="\n")
    for record in read_jsonl(folder / "documents" / "skipped.log")[: args.skipped]:
        print(f"    {record['file']}, {record['where']}: {record['why']}")
    if args.verify:
        parts = sum(len(shards.index(split)) for split in splits)
        print(f"{parts} parts have the checksums they were written with")
    print(*samples(train, tokenizer, args.samples), sep="\n")
