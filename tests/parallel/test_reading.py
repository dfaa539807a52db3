"""Text read with a sharded model: the numbers of one process, in any layout, and training goes on as if nothing was read."""

import copy

import numpy as np
import pytest
import torch
from helpers.scripted import byte_tokenizer
from helpers.tiny import constant_phase, drawn_batch
from helpers.world import run_ranks

from minglm.common.ranks import Ranks
from minglm.config import Layout, ParallelConfig
from minglm.eval import needles, text
from minglm.parallel import parallelize
from minglm.parallel.copies import whole_copy, without_stages
from minglm.parallel.mesh import build_meshes
from minglm.parallel.pipeline import own_model
from minglm.parallel.reading import RanksInStep, reading
from minglm.parallel.sequence import HeadExchange
from minglm.parallel.shard import shard
from minglm.parallel.workers import gathered
from minglm.parallel.world import World
from minglm.testing.model import tiny_model
from minglm.train.loop import accumulate

CPU = torch.device("cpu")
LENGTH = 32
LAYOUTS = [Layout(1, 1, 4, 2, 1), Layout(1, 2, 2, 1, 2), Layout(1, 1, 4, 4, 4)]


def tiny(seed):
    """Return a tiny model with the ids of bytes; every second one ties its embeddings."""
    vocabulary = byte_tokenizer().vocab_size
    tied = seed % 2 == 1
    return tiny_model(
        seed, vocab_size=vocabulary, max_position_embeddings=64, tie_word_embeddings=tied
    )


def scores(model, ranks=None):
    """Return bits per byte, acceptance twice, needles and bits by position, with a few rows a pass."""
    tokenizer = byte_tokenizer()
    random = np.random.default_rng(3)
    documents = [random.integers(0, 256, size) for size in (70, 3, 40, 129, 33)]
    answers = [(d, np.arange(len(d)) % 3 > 0) for d in documents if len(d) > 3]
    hidden = needles.written_needles(tokenizer, 5)
    with pytest.MonkeyPatch.context() as patch:
        for module in (text, needles):
            patch.setattr(module, "TOKENS_PER_PASS", 2 * LENGTH)
        patch.setattr(text, "ROWS_PER_PASS", 1)
        patch.setattr(text, "GUESSES", 5)
        found = needles.needle_test(model, np.concatenate(documents), hidden, [64], [0.5], ranks)
        bins = needles.bits_by_position(model, tokenizer, documents, LENGTH, 10**6, ranks)
        return [
            text.bits_per_byte(model, tokenizer, documents, LENGTH, 10**6, ranks),
            text.mtp_acceptance(model, documents, LENGTH, 10**6, ranks),
            text.mtp_acceptance_on_answers(model, answers, 10**6, ranks),
            *(number for result in found for number in result),
            *(bin.bits for bin in bins),
        ]


def differences(layouts):
    """Return, for each layout, how far the scores are from those of one process, and then the gradients of a batch."""
    found = []
    for number, layout in enumerate(layouts):
        plain = tiny(number)
        model = copy.deepcopy(plain)
        meshes = build_meshes(layout, "cpu")
        shard(model, meshes, ParallelConfig())
        world = World(CPU)
        workers = parallelize(model, world=world, meshes=meshes)
        with reading(model, world.ranks) as (reader, ranks):
            ours = scores(reader, ranks)
        wanted = scores(plain)
        attends = [layer.self_attn.attend for layer in model.model.layers]
        assert all(isinstance(attend, HeadExchange) for attend in attends) == (layout.cp > 1)
        phase = constant_phase(microbatch_tokens=16)
        batch = drawn_batch(number, 6, 8, True)
        accumulate(plain, batch, phase, 0.3)
        accumulate(model, batch, phase, 0.3, workers)
        grads = {name: gathered(p.grad) for name, p in model.named_parameters()}
        norm = sum(p.grad.norm() for p in plain.parameters())
        gradient = max((grads[n] - p.grad).norm() / norm for n, p in plain.named_parameters())
        found.append((max(abs(a - b) for a, b in zip(ours, wanted, strict=True)), float(gradient)))
    return found


def test_a_sharded_model_reads_what_one_process_reads():
    """Divided experts, shared rows, tied embeddings, and more ranks than passes; the next batch is learned from as ever."""
    for answers in run_ranks(differences, 4, LAYOUTS):
        for score, gradient in answers:
            assert score < 1e-4 and gradient < 1e-6, answers  # float32


def pipeline_scores():
    """Return the scores of a pipeline's model, its copy without stages read, and those of one process."""
    plain = tiny(0)
    layout = Layout(2, 1, 1, 1, 1)
    meshes = build_meshes(layout, "cpu")
    model = own_model(plain.config, meshes)
    shard(model, meshes, ParallelConfig())
    model.to_empty(device=CPU)
    whole = plain.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.to_local().copy_(whole[name]) if hasattr(tensor, "to_local") else tensor.copy_(
            whole[name]
        )
    world = World(CPU)
    workers = parallelize(model, world=world, meshes=meshes)
    flat = build_meshes(Layout(1, 1, 2, 2, 1), "cpu")
    copied = without_stages(workers, model, flat, ParallelConfig(), CPU)
    with reading(copied, world.ranks) as (reader, ranks):
        return scores(reader, ranks), scores(plain)


def test_the_stages_of_a_pipeline_are_read_as_one_model():
    """Half of the layers on each of two ranks: a copy has all, half of each layer on each rank."""
    for ours, wanted in run_ranks(pipeline_scores, 2):
        assert max(abs(a - b) for a, b in zip(ours, wanted, strict=True)) < 1e-4


def copies(dtype):
    """Return whether a copy to generate with computes the logits of the model, and the bytes of both."""
    plain = tiny(1)
    plain.dtype = getattr(torch, dtype)
    model = copy.deepcopy(plain)
    meshes = build_meshes(Layout(1, 1, 2, 2, 1), "cpu")
    shard(model, meshes, ParallelConfig())
    workers = parallelize(model, world=World(CPU), meshes=meshes)
    found = []
    for rounded in (True, False):
        whole = whole_copy(workers, model, CPU, rounded)
        tokens_BS = drawn_batch(1, 3, 8, False).tokens_BS
        with torch.no_grad():
            same = torch.equal(whole(tokens_BS), plain(tokens_BS))
        sizes = [sum(p.nbytes for p in m.parameters()) for m in (whole, plain)]
        found.append((same, sizes[0] / sizes[1]))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_to_generate_with_has_half_of_the_bytes_and_the_same_bits(dtype):
    """Matrices are rounded when they are copied in place of each time when they are used; what is in float32 stays."""
    for (same, size), (also_same, full) in run_ranks(copies, 2, dtype):
        assert same and also_same and full == 1
        assert size == 1 if dtype == "float32" else 0.5 < size < 0.6


def passes(kind, tasks):
    """Return the results of a division, and how many passes this rank made."""
    made = []
    ranks = kind(Ranks.of_the_world().group)

    def work(task):
        made.append(task)
        return 10 * task

    return ranks.divide(work, list(range(tasks))), len(made)


@pytest.mark.parametrize("tasks", [0, 1, 3, 7])
def test_ranks_in_step_make_as_many_passes(tasks):
    """Results in order, and equally many passes on each of three ranks; ranks that are not in step are the broken twin."""
    for found, made in run_ranks(passes, 3, RanksInStep, tasks):
        assert found == [10 * task for task in range(tasks)] and made == -(-tasks // 3)
    if tasks == 7:
        assert {made for _, made in run_ranks(passes, 3, Ranks, tasks)} == {2, 3}
