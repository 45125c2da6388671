"""From item vectors to unique semantic IDs: fit a residual quantizer, balance its last stage, resolve collisions.

    python examples/semantic_ids.py --items 20000

A recommender that generates items token by token needs a short ID for each item, similar for similar items (Rajput et
al., Recommender Systems with Generative Retrieval, 2023). Two items must not share one.
"""

from __future__ import annotations

import argparse

import torch

from fastvq import ResidualVQ
from fastvq.parts import balanced_assignment, collisions, unique_ids


def item_vectors(items: int, dim: int) -> torch.Tensor:
    """Return vectors in clusters of very different sizes, as embeddings of a catalog are."""
    torch.manual_seed(0)
    sizes = torch.distributions.Pareto(1.0, 1.2).sample((200,))
    clusters = torch.multinomial(sizes, items, replacement=True)
    return torch.nn.functional.normalize(torch.randn(200, dim)[clusters] + 0.3 * torch.randn(items, dim), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--size", type=int, default=256, help="codes of each stage")
    parser.add_argument("--stages", type=int, default=3)
    options = parser.parse_args()

    x = item_vectors(options.items, options.dim)
    quantizer = ResidualVQ(dim=options.dim, num_quantizers=options.stages, codebook_size=options.size)
    fitted = quantizer.fit(list(x.split(4096)), iterations=5)
    quantizer.eval()
    print("error per element after each stage", [round(float(stage.errors[-1]), 6) for stage in fitted])

    indices = quantizer.encode(x)
    before = collisions(indices)
    print(f"nearest codes: {before.items} of {len(x)} items share an ID, at most {before.largest} one")

    # The last stage, balanced, spreads items that the stages before leave near each other.
    residual = x - quantizer.get_codes_from_indices(indices)[:-1].sum(0)
    codebooks, spread = list(quantizer.codebooks), float(residual.square().sum(1).mean())
    last = balanced_assignment(residual, codebooks[-1], temperature=0.02 * spread)
    balanced = torch.cat([indices[:, :-1], last.indices[:, None]], 1)
    after = collisions(balanced)
    print(f"last stage balanced: {after.items} items share an ID, at most {after.largest} one")

    found = unique_ids(x, codebooks, indices)
    assert collisions(found.indices).items == 0
    error = (x - quantizer.get_output_from_indices(found.indices)).square().mean()
    print(f"unique: {int(found.moved.sum())} items moved, error per element {error:.6f}")


if __name__ == "__main__":
    main()
