"""Autoencoder with binary codes, and a genetic algorithm that evolves the bits towards higher fitness."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored
from fastvq.parts.arguments import in_the_name_of
from fastvq.parts.shapes import Layout

from .lfq import LFQ, LFQLosses

Fitness = Callable[[Any, Tensor], "Tensor | Sequence[float]"]


class EvoLFQOutput(NamedTuple):
    """Result of `EvoLFQ`."""

    reconstructed: Any  # the decoder's output
    indices: Tensor  # as from `LFQ`
    entropy_aux_loss: Tensor  # ()


class Result(NamedTuple):
    """State of `EvoLFQ.evolve` after a generation."""

    pop_bits: Tensor  # the next population (P, ...)
    best_gene: Tensor  # the fittest bits so far
    best_fitness: float  # their fitness
    best_decoded: Any  # their decoded data, or None


class EvoLFQ(Monitored, nn.Module):
    """Encoder, `LFQ` and decoder with the API of vector_quantize_pytorch, and a genetic algorithm on the bits.

    The bits of a sample are its genes: zeros and ones, or -1 and 1 with `is_sign`; (P, bits), (P, N, bits) and
    (P, bits, H, W), in the layout of the latents. Each generation keeps the `elitism_count` fittest members; the other
    children are uniform crossovers of two tournament winners, with mutation.

    Args:
        encoder: maps data to latents, (B, dim) or as `LFQ` takes them.
        decoder: maps quantized latents to data.
        lfq: the quantizer; by default `LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=..., **lfq_kwargs)`.
        pop_size: P. elitism_count: number of members that survive unchanged.
        mutation_rate: probability that a bit flips.
        tournament_size: number of contenders in a tournament.
        generations: number of generations that `evolve` runs.

    Raises:
        ValueError: an invalid argument, by name.

    Source: `LFQ`; Goldberg and Deb, A Comparative Analysis of Selection Schemes Used in Genetic Algorithms, 1991
    (tournaments); Syswerda, Uniform Crossover in Genetic Algorithms, 1989.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        lfq: LFQ | None = None,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        num_codebooks: int = 1,
        pop_size: int = 64,
        mutation_rate: float = 0.02,
        tournament_size: int = 2,
        elitism_count: int = 1,
        generations: int = 50,
        **lfq_kwargs: Any,
    ) -> None:
        super().__init__()
        if not 0 <= elitism_count < pop_size:
            raise ValueError(f"elitism_count: must lie in [0, pop_size = {pop_size}), got {elitism_count}")
        if not 0 <= mutation_rate <= 1:
            raise ValueError(f"mutation_rate: must lie in [0, 1], got {mutation_rate}")
        if tournament_size < 1:
            raise ValueError(f"tournament_size: must be at least 1, got {tournament_size}")
        if lfq is None:
            if dim is None and codebook_size is None:
                raise ValueError("lfq, dim, codebook_size: at least one of them must be given")
            with in_the_name_of(self):
                lfq = LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, **lfq_kwargs)
        self.encoder, self.decoder, self.lfq = encoder, decoder, lfq
        self.pop_size, self.elitism_count = pop_size, elitism_count
        self.mutation_rate, self.tournament_size = mutation_rate, tournament_size
        self.generations = generations

    @property
    def _monitored(self) -> list[Monitored] | None:
        return self.lfq._monitored

    @property
    def _health(self) -> Health:  # type: ignore[override]
        return self.lfq._health

    def _parts(self) -> Iterator[Monitored]:
        yield self.lfq

    @property
    def device(self) -> torch.device:
        return self.lfq.mask.device

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self, x: Any, *, return_loss_breakdown: Literal[True], **options: Any
        ) -> tuple[EvoLFQOutput, LFQLosses]: ...
        @overload
        def __call__(self, x: Any, **options: Any) -> EvoLFQOutput: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(self, x: Any, **kwargs: Any) -> Any:
        """Return (reconstructed, indices, entropy_aux_loss) of x; kwargs are those of `LFQ`.

        With return_loss_breakdown, the breakdown comes second.
        """
        found = self.lfq(self.encoder(x), **kwargs)
        (quantized, indices, loss), *parts = found if kwargs.get("return_loss_breakdown") else (found,)
        result = EvoLFQOutput(self.decoder(quantized), indices, loss)
        return (result, *parts) if parts else result

    @torch.no_grad()
    def encode(
        self, x: Any, return_signs: bool = False, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> Tensor:
        """Return the bits of x as genes: float zeros and ones, or -1 and 1. No state changes.

        mask, lens: as for `LFQ`, of the encoder's output; the bits of vectors that take no part are zero.
        """
        with evaluating(self):
            latents = self.encoder(x)
            layout = Layout.of(latents, self.lfq.dim, channel_first=self.lfq.channel_first)
            indices = layout.indices_to_rows(self.lfq(latents, mask=mask, lens=lens).indices)
        if not self.lfq.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        bits = self.lfq.indices_to_bits(indices) & (indices >= 0).unsqueeze(-1)
        return _genes(layout.from_rows(bits.flatten(-2)), return_signs)

    @torch.no_grad()
    def decode_bits(self, bits: Tensor) -> Any:
        """Decode genes; a gene is one if it is above zero."""
        lfq = self.lfq
        with evaluating(self):
            size = lfq.codebook_dim * lfq.num_codebooks
            if size not in bits.shape[1:]:
                raise ValueError(
                    f"bits: must have an axis of {size} bits beside the population's, got {tuple(bits.shape)}"
                )
            layout = Layout.of(bits.float(), size, channel_first=lfq.channel_first)
            rows = layout.to_rows(bits > 0).unflatten(-1, (lfq.num_codebooks, lfq.codebook_dim))
            indices = layout.indices(lfq.bits_to_indices(rows))
            return self.decoder(lfq.indices_to_codes(indices if lfq.keep_num_codebooks_dim else indices.squeeze(-1)))

    def init_random_population(
        self,
        pop_size: int | None = None,
        shape: Sequence[int] | None = None,
        device: torch.device | None = None,
        is_sign: bool = False,
    ) -> Tensor:
        """Return random genes (P, *shape)."""
        if shape is None:
            raise ValueError("shape: must be given, the shape of one sample's genes")
        size = (self.pop_size if pop_size is None else pop_size, *shape)
        return _genes(torch.randint(0, 2, size, device=self.device if device is None else device) > 0, is_sign)

    def init_population_from_data(
        self, x: Any, pop_size: int | None = None, mutation_rate: float | None = None, is_sign: bool = False
    ) -> Tensor:
        """Return the mutated genes of the first P samples of x, repeated if there are fewer."""
        pop_size = self.pop_size if pop_size is None else pop_size
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        bits = self.encode(x, return_signs=is_sign)
        if len(bits) == 0:
            raise ValueError("x: must hold at least one sample, got none")
        bits = bits[torch.arange(pop_size, device=bits.device) % len(bits)]
        return self.mutate(bits, mutation_rate=rate, is_sign=is_sign) if rate > 0 else bits

    def uniform_crossover(self, parent1: Tensor, parent2: Tensor) -> Tensor:
        """Take each gene from one of the parents, with equal probability."""
        return torch.where(torch.rand_like(parent1.float()) < 0.5, parent1, parent2)

    def mutate(self, population: Tensor, mutation_rate: float | None = None, is_sign: bool = False) -> Tensor:
        """Flip each gene of the population with probability `mutation_rate`."""
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        flipped = -population if is_sign else 1.0 - population
        return torch.where(torch.rand_like(population.float()) < rate, flipped, population)

    def tournament_selection(self, population: Tensor, fitnesses: Tensor, tournament_size: int | None = None) -> Tensor:
        """Return a population of tournament winners, each the fittest of `tournament_size` random contenders."""
        return population[self._winners(fitnesses, (len(population),), tournament_size)]

    @torch.no_grad()
    def step(
        self,
        pop_bits: Tensor,
        fitness_fn: Fitness,
        tournament_size: int | None = None,
        mutation_rate: float | None = None,
        elitism_count: int | None = None,
        is_sign: bool = False,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the next generation of pop_bits (P, ...), and the fitnesses (P,) of this one.

        Args:
            fitness_fn: (decoded pop_bits, pop_bits) -> (P,), a tensor or numbers; higher is better, NaN is worst.
            batch_size: number of members decoded at once; by default all.
            kwargs: ignored.
        """
        elites = self.elitism_count if elitism_count is None else elitism_count
        if not 0 <= elites < len(pop_bits):
            raise ValueError(f"elitism_count: must lie in [0, the population's {len(pop_bits)}), got {elites}")
        decoded = (
            self.decode_bits(pop_bits)
            if batch_size is None
            else torch.cat([self.decode_bits(chunk) for chunk in pop_bits.split(batch_size)])
        )
        fitnesses = torch.as_tensor(fitness_fn(decoded, pop_bits), device=self.device)
        if fitnesses.shape != pop_bits.shape[:1]:
            raise ValueError(
                f"fitness_fn: must return one number for each of {len(pop_bits)}, got {tuple(fitnesses.shape)}"
            )
        ranked = _ranked(fitnesses)
        survivors = pop_bits[ranked.argsort(descending=True, stable=True)[:elites]]
        parents = pop_bits[self._winners(ranked, (len(pop_bits) - elites, 2), tournament_size)]
        children = self.mutate(self.uniform_crossover(parents[:, 0], parents[:, 1]), mutation_rate, is_sign)
        return torch.cat([survivors, children]), fitnesses

    @torch.no_grad()
    def evolve(
        self,
        fitness_fn: Fitness,
        pop_bits: Tensor | None = None,
        pop_size: int | None = None,
        shape: Sequence[int] | None = None,
        generations: int | None = None,
        is_sign: bool = False,
        return_best_decoded: bool = False,
        **step_kwargs: Any,
    ) -> Iterator[Result]:
        """Run `step` repeatedly and yield a `Result` after each generation.

        The best gene is one that was evaluated, and best_fitness its fitness.

        Args:
            pop_bits: the first population; by default P random members of `shape`.
            return_best_decoded: also decode the best gene.
            fitness_fn, is_sign, step_kwargs: as for `step`.
        """
        if pop_bits is None:
            pop_bits = self.init_random_population(pop_size, shape, is_sign=is_sign)
        best_gene, best_fitness, best_decoded = None, float("-inf"), None
        for _ in range(self.generations if generations is None else generations):
            evaluated = pop_bits
            pop_bits, fitnesses = self.step(evaluated, fitness_fn, is_sign=is_sign, **step_kwargs)
            ranked = _ranked(fitnesses)
            fittest = ranked.argmax()
            if best_gene is None or float(ranked[fittest]) > best_fitness:
                best_gene, best_fitness = evaluated[fittest].clone(), float(ranked[fittest])
                if return_best_decoded:
                    best_decoded = self.decode_bits(best_gene[None])[0]
            yield Result(pop_bits, best_gene, best_fitness, best_decoded)

    def _winners(self, fitnesses: Tensor, shape: tuple[int, ...], tournament_size: int | None) -> Tensor:
        """Return the places in the population of the winners of `shape` tournaments."""
        size = self.tournament_size if tournament_size is None else tournament_size
        contenders = torch.randint(0, len(fitnesses), (*shape, size), device=fitnesses.device)
        return contenders.gather(-1, fitnesses[contenders].argmax(-1, keepdim=True)).squeeze(-1)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode within the context; afterwards restore the mode of each submodule."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _genes(bits: Tensor, signs: bool) -> Tensor:
    """Return float genes of bool bits."""
    return torch.where(bits, 1.0, -1.0 if signs else 0.0)


def _ranked(fitnesses: Tensor) -> Tensor:
    """Return float fitnesses with NaN, which compares with nothing, replaced by -infinity."""
    fitnesses = fitnesses if fitnesses.is_floating_point() else fitnesses.float()
    return fitnesses.masked_fill(fitnesses.isnan(), -torch.inf)
