"""The op `min_distance_`: the squared distance of each row to the nearest chosen center."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends

from .checks import check_codes, check_like, check_values
from .registry import explain, op


def _check_min_distance(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_values("codes", codes, (2,), "(M, D)")
    check_codes("codes", codes, x)
    check_like("distances", distances, x, (x.shape[0],), torch.float32)
    if len(distances) > 1 and 0 in distances.stride():
        raise ValueError("distances: must have a place of its own for each row, but is expanded from fewer")


def _min_distance_fake(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    _check_min_distance(distances, x, codes)


@op(fake=_min_distance_fake, mutates=("distances",))
def _min_distance_(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    _check_min_distance(distances, x, codes)
    backends.select("min_distance_", x, codes)(distances, x, codes)


def min_distance_(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    """Lower the squared distance of each row to its nearest center by a few new centers, in place.

        distances_n <- min(distances_n, min_m |x_n - c_m|^2)

    This is D(x)^2 of k-means++, which draws the next center from the rows in proportion to it. The op makes one pass
    over x and no N x D temporary. A row whose distance is 0 isn't read, so that zeros exclude rows.

    Args:
        distances: float32 (N,), not negative; written.
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        codes: the new centers, (M, D), any of these dtypes. For many of them `search` is faster.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Numerics: kernels compute differences, squares and their sum in float64 and round to float32 once. They add in
    different orders and agree to the bit, or to one unit in the last place if a sum lies next to the midpoint of two
    float32 numbers. The torch backend computes in float32 unless an argument is float64, with a relative error below
    (D + 3) 2^-24. Squares beyond float32's range become infinite, those below it 0. The result is independent of the
    number of threads. A row equal to a center has distance 0. A NaN, such as the distance of a non-finite row, changes
    no distance, and any number replaces it. Memory is O(N + M D). Not differentiable.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, section 2.2.
    """
    try:
        _min_distance_(distances, x, codes)
    except RuntimeError as error:
        raise explain(error, _check_min_distance, distances, x, codes) from None
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(distances)
