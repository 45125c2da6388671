"""How far rows are from the codes that there are so far."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends

from .checks import check_codes, check_like, check_values
from .registry import op


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
def min_distance_(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    """The squared distance of each row to the nearest of some codes, once a few more codes are there; in place.

        distances_n <- min(distances_n, min_m |x_n - c_m|^2)

    D(x)^2 of k-means++: the next row is drawn by it, and becomes a code. One pass over x, without an N x D temporary;
    where a distance is 0 already the row isn't read. So zeros are the mask of rows that never count.

    Args:
        distances: float32 (N,), not negative; written.
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        codes: the codes that are new, (M, D), any of these dtypes. For many of them `search` is the way.

    Raises:
        TypeError, ValueError: what doesn't fit, by name.

    Numerics: the kernels take differences, squares and their sum in float64 and round to float32 once. They add in
    different orders, and agree to the bit but where a sum lies next to the middle between two float32 numbers: there to
    one unit in the last place. torch operations, which serve where there is no kernel, take float32 unless an argument
    is float64, and err by less than (D + 3) 2^-24 of the distance. Squares beyond float32's range are infinite, those
    below it 0. No number of threads changes a bit. A row equal to a code has 0. What is no number, as the distance of a
    row that isn't finite, changes nothing, and any number replaces it. Memory is O(N + M D). Not differentiable.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, section 2.2.
    """
    _check_min_distance(distances, x, codes)
    backends.select("min_distance_", x.device)(distances, x, codes)
