"""What is in the shards of a config: tables, samples, checksums; the verb `data` (paper 2.2; no counterpart there).

    source   documents   tokens   text   bytes a token, per part train and heldout
    what each step of cleaning took, and the records that could not be used
    samples: the first tokens of documents drawn at random, as text again

Simplified: text bytes of a source count a repeated document as often as it is used.
"""

import json
import random
from pathlib import Path

from minglm.common.files import read_jsonl
from minglm.config import load_config
from minglm.data.build import prepare
from minglm.data.store import shards
from minglm.data.workers import Executor
from minglm.recipe.solutions import task_data

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


def command(parser, words):
    """Build the token shards of CONFIG where they are missing, and say what is in them and what cleaning took."""
    parser.add_argument("config", help="a config file, such as configs/toy.py")
    parser.add_argument("--out", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--executor",
        default="local",
        choices=[name.value for name in Executor],
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
        "--dry-run", action="store_true", help="say where the shards would be, read nothing"
    )
    args, overrides = parser.parse_known_args(words)
    run = load_config(args.config, overrides)
    folder = Path(args.out or f"runs/{run.name}") / "data"
    if args.dry_run:
        built = (
            "are"
            if all(shards.index(folder / part) is not None for part in ("train", "heldout"))
            else "would be"
        )
        print(f"the shards of {run.name}, config {run.hash()}, {built} in {folder}")
        return
    if args.verify:
        for part in ("train", "heldout"):
            for number, wrong in shards.damaged(folder / part, verify=True).items():
                print(f"{wrong}; it is built again")
                shards.forget(folder / part, number)
    tokenizer, train, _, _ = prepare(run, folder, task_data(run), Executor(args.executor))
    found = stock(folder)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    print(*render(found), sep="\n")
    for record in read_jsonl(folder / "documents" / "skipped.log")[: args.skipped]:
        print(f"    {record['file']}, {record['where']}: {record['why']}")
    if args.verify:
        parts = sum(len(shards.index(folder / part)) for part in ("train", "heldout"))
        print(f"{parts} parts have the checksums they were written with")
    print(*samples(train, tokenizer, args.samples), sep="\n")
