# %% [markdown]
# # 01 Tokens: what does the model read, and what does cutting documents cost?
#
# A model reads rows of S token ids. Two choices turn text into rows. The *vocabulary* decides how many bytes a token
# covers. The *packing* decides where documents begin and end in a row. In pre-training GLM-4.5 cuts documents at
# arbitrary places, which works as data augmentation. In mid-training it fits whole documents into rows, so that
# reasoning and repositories are not cut (paper 2.4).
#
# **Your prediction.** Write down first: (1) With one document per row and S = 1024, on the files and docstrings of a
# library, what share of the positions is padding? And with best fit? (2) Documents are joined and cut every 1024
# tokens. What share of the documents that would have fitted into a row is cut? (3) From 2,048 to 8,192 ids, how many
# more bytes does a token cover? Is that worth it for a model of 1.7 M parameters?
#
# **Equation** (paper 2.2, 2.4; `minglm/data/packing.py`, `minglm/data/tokenizer.py`). A cut every S tokens, at a random
# place, falls inside a document of L <= S tokens with
#
#     P(cut) = (L - 1) / S,     and then, on average, half of the document no longer sees its beginning
#     padding of one document per row = 1 - mean(L) / S
#     work to read a byte = FLOPs per token (vocabulary) / bytes per token (vocabulary)

# %%
import dataclasses

import numpy as np
from tqdm import tqdm

from minglm import lesson, load_config
from minglm.config import DataConfig, ModelConfig
from minglm.data import packing
from minglm.data.cleaning.exact import digest, originals
from minglm.data.mixture import Mixture
from minglm.data.sources import corpus
from minglm.data.tokenization import tokenize
from minglm.data.tokenizer import Tokenizer
from minglm.plan.counts import flops_per_token
from minglm.report import drawing

VOCABULARIES = [292, 512, 1024, 2048, 4096, 8192]
LENGTHS = [128, 256, 512, 1024, 2048, 4096]
SIZES = {"megabytes": 1.0, "generated": 200, "vocabularies": VOCABULARIES, "lengths": LENGTHS}
SMOKE = {"megabytes": 0.05, "generated": 30, "vocabularies": [292, 400], "lengths": [64, 128]}
TOY_VOCABULARY = 2048
TEXTS = {
    "chinese": ("Chinese Q&A", "#55958c"),
    "prose": ("English prose", "#1f5fa8"),
    "code": ("Python", "#c2571a"),
}
FIT = "#1f5fa8"
CUT = "#c2571a"
PAD = "#9a5ba3"

# %% [markdown]
# ## The lines that matter
# `main` prints `best_fit` and `TruncatedRows` from minglm itself. Best fit puts each document into the open row with the
# least room that is still enough. `TruncatedRows` joins the documents into a ring of tokens and starts at a random
# place in it.
#
# ## Experiment
# The text is library code, docstrings and generated text. For each seed, tokenizers of several sizes are trained on a
# random 70% of the files and measured on the rest. Then all documents are packed into rows, one epoch per packing.
# Best fit is measured on `Mixture`, the stream used in training, which chooses from four batches at a time.


# %%
def file_of(document):
    """Return the name of the file that a document comes from; a docstring belongs to its file."""
    return document.name.partition(":")[0]


def compression(documents, vocabulary, seed):
    """Train a tokenizer and measure it on unseen files. Returns ({kind of text: bytes per token}, tokenizer)."""
    # A random 70% of the files is for training.
    files = sorted({file_of(document) for document in documents})
    draws = np.random.default_rng(seed).random(len(files))
    seen = {file for file, draw in zip(files, draws, strict=True) if draw < 0.7}
    training_texts = [document.text for document in documents if file_of(document) in seen]
    tokenizer = Tokenizer.train(training_texts, vocabulary)

    # The other files, by kind of text.
    texts = {kind: [] for kind in TEXTS}
    for document in documents:
        kind = "chinese" if document.language == "zh" else document.source
        if kind in texts and file_of(document) not in seen:
            texts[kind].append(document.text)

    bytes_per_token = {}
    for kind, unseen in texts.items():
        num_bytes = sum(len(text.encode()) for text in unseen)
        num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(unseen))
        bytes_per_token[kind] = num_bytes / num_tokens
    return bytes_per_token, tokenizer


def pack(documents, length, seed):
    """Pack one epoch into rows of `length` tokens. Returns padding of two packings, and what cutting does to documents."""
    sizes = np.array([len(document) for document in documents])
    random = np.random.default_rng(seed)

    # Best fit, as in training: the share of positions that hold text, in each batch.
    stream = Mixture({"all": documents}, {"all": 1.0}, length, "best_fit", seed)
    utilisation = []
    while stream.epochs["all"] < 1:
        documents_BS = stream.next(16).documents_BS
        utilisation.append(float((documents_BS >= 0).float().mean()))

    # Cut anywhere: the pieces of each document, and its tokens in pieces without the document's beginning.
    pieces = np.zeros(len(sizes), int)
    lost = np.zeros(len(sizes), int)
    order = random.permutation(len(sizes))
    offset = int(random.integers(length))
    for row in packing.TruncatedRows(sizes, order, length, offset):
        for document, start, stop in row:
            pieces[document] += 1
            if start > 0:
                lost[document] += stop - start

    # One document per row; a document longer than a row takes several.
    positions = len(packing.cut_to_fit(sizes, length)) * length

    fits = sizes <= length
    fitting = sizes[fits]
    cut_probability = (fitting - 1) / length  # P(cut)
    values = {
        "alone": 1 - sizes.sum() / positions,
        "best fit": 1 - np.mean(utilisation),
        "cut": (pieces[fits] > 1).mean(),
        "cut, expected": cut_probability.mean(),
        "lost": lost[fits].sum() / fitting.sum(),
        "lost, expected": (cut_probability * fitting).sum() / fitting.sum() / 2,
    }
    return {"length": length, "seed": seed} | {name: float(value) for name, value in values.items()}


def read_documents(sizes, seed):
    """Return the documents of the experiment: deduplicated, and without whole repositories."""
    data = DataConfig(
        corpus_megabytes=sizes["megabytes"],
        synthetic_documents=sizes["generated"],
        heldout=0.0,
    )
    documents = [document for document in corpus.documents(data, seed) if document.text.strip()]
    unique = originals([(digest(document), document.heldout) for document in documents])
    documents = [documents[index] for index in unique]
    return [document for document in documents if document.source != "repository"]


def experiment(sizes, seeds):
    """Make all measurements."""
    models = {
        "the toy": load_config(lesson.FIGURES.parent / "configs" / "toy.py").model,
        "GLM-4.5": ModelConfig(),
    }
    packed_vocabulary = max(v for v in sizes["vocabularies"] if v <= TOY_VOCABULARY)
    log = {"compression": [], "packing": []}
    for seed in tqdm(range(seeds), desc="seeds", disable=None):
        documents = read_documents(sizes, seed)
        for vocabulary in sizes["vocabularies"]:
            values, tokenizer = compression(documents, vocabulary, seed)
            for name, model in models.items():
                resized = dataclasses.replace(model, vocab_size=vocabulary)
                values[name] = flops_per_token(resized, 128).total / values["code"]
            log["compression"].append({"vocabulary": vocabulary, "seed": seed, **values})
            if vocabulary == packed_vocabulary:
                shards = tokenize(documents, tokenizer).values()
                arrays = [array for shard in shards for array in shard]
        for length in sizes["lengths"]:
            log["packing"].append(pack(arrays, length, seed))
    return log | {"documents": len(arrays), "tokens": sum(map(len, arrays))}


# %%
def series(rows, field, x):
    """Return [(x, mean, lowest, highest over the seeds)] of a field of the log."""
    groups = {}
    for row in rows:
        groups.setdefault(row[x], []).append(row[field])
    return [
        (value, sum(group) / len(group), min(group), max(group))
        for value, group in sorted(groups.items())
    ]


def draw_line(axis, rows, field, x, shade, scale=100.0, **style):
    """Draw the mean of a field over the seeds with its range. Returns the scaled mean."""
    columns = zip(*series(rows, field, x), strict=True)
    xs, mean, low, high = (np.array(column) for column in columns)
    style = {"linewidth": 1.6, "marker": "o", "markersize": 4} | style
    axis.fill_between(xs, scale * low, scale * high, color=shade, alpha=0.2, linewidth=0)
    axis.plot(xs, scale * mean, color=shade, **style)
    return scale * mean


def draw_padding(axis, log):
    """Draw the share of padding with each packing, by row length."""
    lengths = log["sizes"]["lengths"]
    label = {"textcoords": "offset points", "va": "center"}
    alone = draw_line(axis, log["packing"], "alone", "length", PAD)
    fitted = draw_line(axis, log["packing"], "best fit", "length", FIT)
    half = len(lengths) // 2
    middle = (lengths[half], alone[half])
    axis.annotate("one document per row", middle, (-8, 6), color=PAD, ha="right", **label)
    text = f"best fit: {fitted[0]:.1f}% at {lengths[0]:,}, {fitted[-1]:.2f}% at {lengths[-1]:,}"
    axis.annotate(text, (lengths[-1], fitted[-1]), (0, 10), color=FIT, ha="right", **label)
    axis.annotate("cut anywhere: 0", (lengths[-1], 0), (0, -11), color=CUT, ha="right", **label)


def draw_cuts(axis, log):
    """Draw the shares of documents and tokens that cutting affects: measured as dots, expected as lines."""
    for field, shade in (("cut", CUT), ("lost", PAD)):
        draw_line(axis, log["packing"], field, "length", shade, linestyle="none")
        expected = f"{field}, expected"
        draw_line(axis, log["packing"], expected, "length", shade, marker="", linewidth=1)
    axis.text(0.22, 0.8, "documents that are cut", color=CUT, transform=axis.transAxes)
    text = "tokens that no longer see\ntheir document's beginning"
    axis.text(0.03, 0.14, text, color=PAD, transform=axis.transAxes)


def draw_compression(axis, log):
    """Draw the bytes per token of each kind of text, by size of the vocabulary."""
    last = log["sizes"]["vocabularies"][-1]
    ends = []
    for kind, (_, shade) in TEXTS.items():
        ends.append(draw_line(axis, log["compression"], kind, "vocabulary", shade, 1)[-1])
    label = {"textcoords": "offset points", "va": "center"}
    heights = drawing.spread(ends, 0.3)
    for (name, shade), height in zip(TEXTS.values(), heights, strict=True):
        axis.annotate(name, (last, height), (8, 0), color=shade, **label)


def draw_work(axis, log):
    """Draw the FLOPs to read a byte of code, as a percentage of those with the smallest vocabulary."""
    last = log["sizes"]["vocabularies"][-1]
    label = {"textcoords": "offset points", "va": "center", "ha": "right"}
    for name, shade in (("the toy", CUT), ("GLM-4.5", FIT)):
        first_mean = series(log["compression"], name, "vocabulary")[0][1]
        work = draw_line(axis, log["compression"], name, "vocabulary", shade, 100 / first_mean)
        axis.annotate(name, (last, work[-1]), (-30, 16), color=shade, **label)


def label_axis(axis, heading, x, y, ticks, bottom=0):
    """Write heading and labels of a panel, and set a logarithmic x axis with these ticks."""
    drawing.title(axis, heading)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{value:,}" for value in ticks])
    axis.minorticks_off()
    axis.set(ylim=(bottom, None), xlabel=x, ylabel=y)


def draw(log):
    """Draw the figure from the log alone."""
    figure, ((padding, cuts), (short, work)) = drawing.canvas(2, 2, (10, 7.2))
    lengths = log["sizes"]["lengths"]
    vocabularies = log["sizes"]["vocabularies"]
    draw_padding(padding, log)
    draw_cuts(cuts, log)
    draw_compression(short, log)
    draw_work(work, log)

    row = "row length S (tokens)"
    label_axis(padding, "Padding", row, "positions that hold padding (%)", lengths, bottom=-9)
    heading = "Cut anywhere: measured (dots), expected (lines)"
    label_axis(cuts, heading, row, "share of documents that fit a row (%)", lengths)
    ids = "vocabulary (ids)"
    label_axis(short, "What a token covers", ids, "bytes per token, unseen text", vocabularies)
    short.set_xlim(None, 3 * vocabularies[-1])  # room for the names at the ends of the lines
    unit = f"FLOPs to read a byte of code ({vocabularies[0]} ids: 100)"
    label_axis(work, "What a byte costs", ids, unit, vocabularies)

    seeds = len(log["seeds"])
    note = (
        f"{log['documents']:,} documents, {log['tokens']:,} tokens; mean and range of {seeds} seeds"
    )
    figure.supxlabel(note, fontsize=8.5, color="#5c5c64")
    return figure


# %% [markdown]
# ## Figure: drawn by `draw` from `figures/01_tokens.json`. What would prove us wrong
# `verdicts` reads the log, and each claim can come out False. The experiment cannot show that text which is cheaper to
# read is also learned as well.
#
# ## Exercise
# Write `mine(lengths, capacity)`, best fit with a segment tree over the rooms or with a heap, and test it with the
# contract: `check_packer(mine)` from `minglm.testing.data`. Then make it *first* fit: which one property fails, and
# why do the others hold? Check: replace `best_fit` with it, and run `pytest tests/data/test_packing.py -k "contract"`.
#
# ## At full scale
# GLM-4.5 has 151,552 ids. Its embedding and head are 0.4% of its weights; in the toy, with 2,048 ids, they are 23%. A
# larger model can therefore afford a larger vocabulary. Its rows have 4,096 tokens while documents are cut, and 32,768
# or more once documents stay whole.


# %%
def verdicts(log):
    """Return {claim: whether the log supports it}."""
    rows = log["packing"]
    gap = max(abs(row["cut"] - row["cut, expected"]) for row in rows)
    best = max(row["best fit"] for row in rows)
    alone = min(row["alone"] for row in rows)

    cheapest = {}
    for name in ("the toy", "GLM-4.5"):
        costs = series(log["compression"], name, "vocabulary")
        cheapest[name] = min(costs, key=lambda row: row[1])[0]
    toy = cheapest["the toy"]
    large = cheapest["GLM-4.5"]

    claims = [
        (
            f"measured and expected shares of cut documents differ by at most {100 * gap:.1f} points",
            gap < 0.03,
        ),
        (
            f"best fit pads at most {100 * best:.1f}%, one document per row at least {100 * alone:.0f}%",
            best < alone / 10,
        ),
        (
            f"the cheapest vocabulary of those tried is smaller for the toy: {toy}, GLM-4.5 {large}",
            toy < large,
        ),
    ]
    return {claim: bool(holds) for claim, holds in claims}


def main(argv=None):
    """Run the experiment, or only redraw its figure, and print what it shows."""
    lesson.Lesson(
        name="01_tokens",
        experiment=experiment,
        draw=draw,
        verdicts=verdicts,
        shown=[packing.best_fit, packing.TruncatedRows],
        sizes=SIZES,
        smoke=SMOKE,
    ).main(argv)


if __name__ == "__main__":
    main()
