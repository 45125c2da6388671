"""What arguments of `VectorQuantize` can't be, alone or together."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def check_vector_quantize(**given: Any) -> None:
    """Raises a ValueError that names the argument, or the pair. What a codebook is given, `Codebook` checks."""
    for name in ("dim", "codebook_size", "codebook_dim", "heads"):
        check_positive(name, given[name])
    for name in (
        "commitment_weight",
        "threshold_ema_dead_code",
        "sample_codebook_temp",
        "orthogonal_reg_weight",
        "codebook_diversity_loss_weight",
        "directional_reparam_variance",
    ):
        if not given[name] >= 0:
            raise ValueError(f"{name}: must not be negative, got {given[name]}")
    for name in ("sync_update_v", "affine_param_batch_decay", "affine_param_codebook_decay"):
        if not 0 <= given[name] <= 1:
            raise ValueError(f"{name}: must lie in [0, 1], got {given[name]}")
    if not given["codebook_diversity_temperature"] > 0:
        raise ValueError(
            f"codebook_diversity_temperature: must be positive, got {given['codebook_diversity_temperature']}"
        )
    if given["orthogonal_reg_max_codes"] is not None:
        check_positive("orthogonal_reg_max_codes", given["orthogonal_reg_max_codes"])

    learnable = given["learnable_codebook"]
    if learnable and given["ema_update"]:
        raise ValueError("ema_update: must be False beside learnable_codebook=True: one of them moves the codebook")
    if given["use_cosine_sim"]:
        for name in ("learnable_codebook", "affine_param"):
            if given[name]:
                raise ValueError(f"{name}: must be False beside use_cosine_sim=True")
    estimators = [name for name in ("straight_through", "rotation_trick", "directional_reparam") if given[name]]
    if len(estimators) > 1:
        raise ValueError(f"{', '.join(estimators)}: only one of them may be True")
    if given["straight_through"] and learnable:
        raise ValueError("straight_through: must be False beside learnable_codebook=True")
    if given["directional_reparam"] and not given["threshold_ema_dead_code"]:
        raise ValueError("threshold_ema_dead_code: must be positive beside directional_reparam=True")
    for name in ("vq_bridge", "in_place_codebook_optimizer"):
        if given[name] is not None and not learnable:
            raise ValueError(f"learnable_codebook: must be True beside {name}")
    if given["sync_update_v"] and not learnable:
        raise ValueError("learnable_codebook: must be True beside sync_update_v")
    if given["accept_image_fmap"] and given["accept_3d_fmap"]:
        raise ValueError("accept_image_fmap, accept_3d_fmap: only one of them may be True")


def check_positive(name: str, value: Any) -> None:
    """Raises a ValueError that names the argument unless it is an integer, numpy's too, of at least 1."""
    if not (isinstance(value, Integral) and int(value) >= 1):
        raise ValueError(f"{name}: must be an integer of at least 1, got {value!r}")
