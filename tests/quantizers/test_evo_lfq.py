"""EvoLFQ compared with vector_quantize_pytorch's, and its additional features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvq

from ..cases import close, generator
from ..peers import assert_same_outputs, assert_same_step, vqp


def batch(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def evo(dim=3, num_codebooks=1, **options):
    return fastvq.EvoLFQ(nn.Identity(), nn.Identity(), dim=dim, num_codebooks=num_codebooks, **options)


def autoencoders(**options):
    """Return this package's and the peer's autoencoders with equal weights."""
    built = []
    for package in (fastvq, vqp):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5))
        built.append(package.EvoLFQ(encoder, nn.Linear(6, 5), dim=6, **options))
    return built


def weights(genes):
    """Return the number that the bits form."""
    values = 2.0 ** torch.arange(genes[0].numel() - 1, -1, -1)
    return ((genes > 0).flatten(1) * values).sum(-1)


@pytest.mark.parametrize("options", [{}, {"codebook_size": 8}, {"codebook_size": 8, "num_codebooks": 2}])
@pytest.mark.parametrize("shape", [(7, 5), (2, 4, 5)])
def test_steps(options, shape):
    ours, theirs = autoencoders(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    result = assert_same_step(ours, theirs, batch(*shape), inv_temperature=1.0)
    assert result._fields == ("reconstructed", "indices", "entropy_aux_loss")
    assert torch.equal(ours.code_counts, ours.lfq.code_counts)


def test_loss_breakdown():
    ours, _ = autoencoders()
    result, parts = ours(batch(2, 4, 5), return_loss_breakdown=True)
    assert result.reconstructed.shape == (2, 4, 5)
    assert parts._fields == ("per_sample_entropy", "batch_entropy", "commitment")


@pytest.mark.parametrize("shape", [(7, 5), (2, 4, 5)])
@pytest.mark.parametrize("return_signs", [True, False])
def test_encode_and_decode(shape, return_signs):
    ours, theirs = autoencoders()
    bits = ours.encode(batch(*shape), return_signs=return_signs)
    assert torch.equal(bits, theirs.encode(batch(*shape), return_signs=return_signs))
    close(ours.decode_bits(bits), theirs.decode_bits(bits))
    assert ours.training
    assert ours.encoder[1].training


def test_parts_that_were_in_eval_stay_there():
    ours, _ = autoencoders()
    ours.encoder.eval()
    ours.decode_bits(ours.encode(batch(2, 5)))
    assert ours.training
    assert not ours.encoder.training


@pytest.mark.parametrize("num_codebooks", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"has_projections": True}, {"orthogonal_rotation": True}, {"spherical": True}, {"keep_num_codebooks_dim": True}],
)
@pytest.mark.parametrize("shape", [(6, -1), (2, 3, -1), (2, -1, 2, 4)])
def test_genes_are_the_bits_of_the_codes(num_codebooks, options, shape):
    """The peer takes the signs of the projected and rotated output instead."""
    torch.manual_seed(0)
    ours = evo(dim=3 * num_codebooks, codebook_size=8, num_codebooks=num_codebooks, **options)
    x = batch(*(3 * num_codebooks if size == -1 else size for size in shape))
    genes = ours.encode(x)
    assert genes.shape == x.shape
    indices = ours.eval()(x).indices
    indices = indices if ours.lfq.keep_num_codebooks_dim else indices[..., None]
    rows = genes.movedim(1, -1) if genes.dim() == 4 else genes
    assert torch.equal((rows.unflatten(-1, (num_codebooks, 3)) * torch.tensor([4, 2, 1])).sum(-1).long(), indices)
    close(ours.decode_bits(genes).detach(), ours(x).reconstructed.detach())
    close(ours.decode_bits(ours.encode(x, return_signs=True)).detach(), ours(x).reconstructed.detach())
    assert torch.equal(ours.init_population_from_data(x, pop_size=9, mutation_rate=0.0)[: len(x)], genes)


@pytest.mark.parametrize("is_sign", [True, False])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_generation(is_sign, batch_size):
    ours, theirs = autoencoders(mutation_rate=0.2, tournament_size=3, elitism_count=2)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        population = module.init_random_population(8, (6,), is_sign=is_sign)
        torch.manual_seed(4)
        step = module.step(population, lambda decoded, _: decoded.sum(-1), is_sign=is_sign, batch_size=batch_size)
        torch.manual_seed(5)
        from_data = module.init_population_from_data(batch(3, 5), 8, is_sign=is_sign)
        chosen = module.tournament_selection(population, step[1])
        crossed = module.uniform_crossover(population, from_data)
        results.append((population, *step, from_data, chosen, crossed))
    assert_same_outputs(*results)


@pytest.mark.parametrize("is_sign", [True, False])
def test_the_best_gene_was_evaluated(is_sign):
    """The peer takes it from the next population, where another one stands."""
    ours = evo(dim=4, pop_size=6, elitism_count=3, mutation_rate=0.5)
    torch.manual_seed(0)
    seen = []

    def fitness(decoded, genes):
        close(decoded, torch.where(genes > 0, 1.0, -1.0))
        seen.append((genes.clone(), weights(genes)))
        return weights(genes).tolist() if len(seen) % 2 else weights(genes)

    results = ours.evolve(fitness, shape=(4,), generations=5, is_sign=is_sign, return_best_decoded=True)
    for generation, result in enumerate(results, 1):
        assert len(seen) == generation
        assert result._fields == ("pop_bits", "best_gene", "best_fitness", "best_decoded")
        assert result.best_fitness == max(float(scores.max()) for _, scores in seen)
        assert float(weights(result.best_gene[None])) == result.best_fitness
        close(result.best_decoded, torch.where(result.best_gene > 0, 1.0, -1.0))
        elites = weights(result.pop_bits)[:3]
        assert torch.equal(elites, seen[-1][1].sort(descending=True).values[:3])


def test_evolution_finds_the_best():
    torch.manual_seed(0)
    ours = evo(dim=12, entropy_loss_weight=0.0)
    *_, last = ours.evolve(lambda _, genes: genes.sum(-1), shape=(12,))
    assert last.best_fitness == 12
    assert last.pop_bits.mean() > 0.9


def test_results_stay_as_they_were():
    ours = evo(pop_size=4)
    result = next(ours.evolve(lambda _, genes: weights(genes), shape=(3,)))
    best = result.best_gene.clone()
    result.pop_bits.zero_()
    assert torch.equal(result.best_gene, best)
    assert result.best_decoded is None


def test_nan_fitness_is_worst():
    ours = evo(pop_size=4, elitism_count=2)
    population = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1]])
    scores = torch.tensor([1.0, torch.nan, 3.0, torch.nan])
    assert torch.equal(ours.step(population, lambda *_: scores)[0][:2], population[[2, 0]])
    result = next(ours.evolve(lambda *_: scores, population))
    assert (result.best_fitness, result.best_gene.tolist()) == (3.0, [0, 1, 0])
    worst = next(ours.evolve(lambda *_: torch.full((4,), torch.nan), population, return_best_decoded=True))
    assert worst.best_fitness == -torch.inf
    assert worst.best_decoded.shape == (3,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastvq.EvoLFQ(nn.Identity(), nn.Identity()), "lfq, dim, codebook_size: at least one"),
        (lambda: evo(pop_size=2, elitism_count=2), "elitism_count: must lie"),
        (lambda: evo(mutation_rate=1.5), "mutation_rate: must lie"),
        (lambda: evo(tournament_size=0), "tournament_size: must be"),
        (lambda: evo().init_random_population(4), "shape: must be given"),
        (lambda: next(evo().evolve(lambda *_: [1.0])), "shape: must be given"),
        (lambda: evo().step(torch.zeros(4, 3), lambda *_: [1.0]), "fitness_fn: must return"),
        (lambda: evo().step(torch.zeros(4, 3), lambda *_: [1.0] * 4, elitism_count=4), "elitism_count: must lie"),
        (lambda: evo().decode_bits(torch.zeros(4, 5)), "bits: must have an axis of 3"),
        (lambda: evo().init_population_from_data(torch.zeros(0, 3)), "x: must hold at least one"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
