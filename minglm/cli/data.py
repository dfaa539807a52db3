"""The verb `data`: build the token shards of a config, and tell what is in them (paper 2.2).

    source   documents   tokens   text   bytes a token, of the training shards, and held-out tokens
    what each step of cleaning took, and the records that could not be used
    samples: the first tokens of documents drawn at random, as text again

Simplified: the bytes of text of a source count a repeated document as often as it is used.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minglm.cli.arguments import add_config, folder, refuse_idle, whole

if TYPE_CHECKING:
    from minglm.data.store.shards import Shard
    from minglm.data.tokenizer import Tokenizer

SAMPLE_CHARACTERS = 240
"""Characters of a sample."""

SAMPLE_LINES = 6

SKIPPED = 3
"""Records that could not be used and are shown."""


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a table as lines of text.

    The first row is the head; all columns but the first are aligned right.
    """
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        lines.append("  ".join(cells).rstrip())
    return lines


def summary(folder: Path) -> dict[str, Any]:
    """Return everything that is known of the shards under `folder`, as JSON values."""
    from minglm.data.store.sealed import read_sealed
    from minglm.data.store.shards import source_totals

    about = read_sealed(folder / "about.json")
    result: dict[str, Any] = {}
    for split in ("train", "heldout"):
        totals = source_totals(folder / split)
        result[split] = {source: total._asdict() for source, total in totals.items()}
    for name in (
        "documents",
        "cleaning",
        "skipped",
        "skipped_log",
        "skipped_reasons",
        "not_read",
        "seconds",
    ):
        result[name] = about[name]
    return result


def render(summary: dict[str, Any]) -> list[str]:
    """Return a summary as lines of text."""
    lines = [*_source_lines(summary), "", *_cleaning_lines(summary["cleaning"])]
    for kind, report in summary["cleaning"].get("judges", {}).items():
        before, after = report["calibration_error"]
        lines.append(
            f"quality of {kind}: learned from {report['documents']} marks, "
            f"correlation {report['correlation']}, "
            f"calibration error {before} before and {after} after calibration"
        )
    skipped = f"{summary['skipped']:,} records could not be used"
    if summary["skipped"]:
        skipped += f"; see {summary['skipped_log']}"
    lines.append(skipped)
    lines += [f"    {count:,}: {why}" for why, count in (summary["skipped_reasons"] or {}).items()]
    if summary["not_read"]:
        kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in summary["not_read"].items())
        lines.append(f"files of a kind that is not read: {kinds}")
    return lines


def _source_lines(summary: dict[str, Any]) -> list[str]:
    """Return the table of sources."""
    head = ["source", "documents", "tokens", "bytes of text", "bytes a token", "held-out tokens"]
    rows: list[list[Any]] = []
    documents = 0
    tokens = 0
    text_bytes = 0
    heldout_tokens = 0
    for source, total in summary["train"].items():
        heldout = summary["heldout"].get(source, {"tokens": 0})["tokens"]
        rate = f"{total['bytes'] / total['tokens']:.2f}" if total["tokens"] else "-"
        row = [source, total["documents"], total["tokens"], total["bytes"], rate, heldout]
        rows.append(row)
        documents += total["documents"]
        tokens += total["tokens"]
        text_bytes += total["bytes"]
        heldout_tokens += heldout
    rate = f"{text_bytes / max(1, tokens):.2f}"
    rows.append(["all", documents, tokens, text_bytes, rate, heldout_tokens])
    return table([head, *rows])


def _cleaning_lines(cleaning: dict[str, Any]) -> list[str]:
    """Return the table of the steps of cleaning: what each removed or repeated, and of which sources."""
    rows: list[list[Any]] = [["cleaning", "documents"]]
    details = ["of which"]
    for step, counts in cleaning.items():
        if step == "judges":
            continue
        if step == "decontamination":
            counts = counts["removed"]
        by_source = {} if isinstance(counts, int) else counts
        total = counts if isinstance(counts, int) else sum(by_source.values())
        rows.append([step.replace("_", " "), total])
        details.append(", ".join(f"{name} {count:,}" for name, count in by_source.items()))
    lines = table(rows)
    return [
        f"{line}  {detail}" if detail else line for line, detail in zip(lines, details, strict=True)
    ]


def samples(
    train: "Mapping[str, Shard]", tokenizer: "Tokenizer", count: int, seed: int = 0
) -> Iterator[str]:
    """Yield lines of text that show `count` documents of each source, drawn at random."""
    rng = random.Random(seed)
    for source, documents in train.items():
        drawn = rng.sample(range(len(documents)), min(count, len(documents)))
        for index in sorted(drawn):
            tokens = documents[index]
            # A token has one byte or more, so these are enough tokens.
            text = tokenizer.decode(tokens[:SAMPLE_CHARACTERS])[:SAMPLE_CHARACTERS]
            yield f"\n{source}, document {index:,}, {len(tokens):,} tokens"
            for line in text.splitlines()[:SAMPLE_LINES]:
                yield f"    {line}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data`."""
    add_config(parser)
    parser.add_argument("--out", type=folder, help="folder of the run (default: runs/NAME)")
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
        "--samples", type=whole(0), metavar="N", help="show N documents of each source (default: 0)"
    )
    parser.add_argument(
        "--skipped",
        type=whole(0),
        metavar="N",
        help=f"show N records that could not be used (default: {SKIPPED})",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument(
        "--dry-run", action="store_true", help="print where the shards would be, read nothing"
    )


def main(args: argparse.Namespace) -> None:
    """Build the token shards of CONFIG where they are missing; print what is in them and what cleaning took."""
    from minglm.common.files import check_out, read_jsonl
    from minglm.common.lock import locked
    from minglm.config import load_config
    from minglm.data.build import prepare
    from minglm.data.store import shards
    from minglm.data.workers import Executor
    from minglm.recipe.inputs import check_data
    from minglm.recipe.solutions import task_data

    shows = {"--samples": args.samples, "--skipped": args.skipped}
    if args.dry_run:
        refuse_idle(shows | {"--verify": args.verify, "--json": args.json}, "with --dry-run")
    if args.json:
        refuse_idle(shows, "with --json")
    run = load_config(args.config, args.overrides)
    out = Path(args.out or f"runs/{run.name}")
    check_out(out)
    check_data(run)
    folder = out / "data"
    splits = [folder / "train", folder / "heldout"]
    if args.dry_run:
        built = all(shards.chunk_numbers(split) is not None for split in splits)
        state = "are" if built else "would be"
        print(f"the shards of {run.name}, config {run.hash()}, {state} in {folder}")
        return
    with locked(out):
        if args.verify:
            for split in splits:
                for number, fault in shards.find_damage(split, verify=True).items():
                    print(f"{fault}; it is built again")
                    shards.discard_chunk(split, number)
        data = prepare(run, folder, task_data(run), Executor(args.executor))
    found = summary(folder)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    print(*render(found), sep="\n")
    for record in read_jsonl(folder / "documents" / "skipped.log")[
        : SKIPPED if args.skipped is None else args.skipped
    ]:
        print(f"    {record['file']}, {record['where']}: {record['why']}")
    if args.verify:
        chunks = sum(len(shards.chunk_numbers(split) or []) for split in splits)
        print(f"{chunks} chunks have the checksums they were written with")
    print(*samples(data.train, data.tokenizer, args.samples or 0), sep="\n")
