"""Residual quantization over scales: coarse codes for the whole signal, finer ones for the residual."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.codebook.fit import Fitted, Passes, fit_, passes, refuse_frozen
from fastvq.codebook.health import Health, Monitored
from fastvq.codebook.recompute import REMEMBERED, History
from fastvq.distributed import tie_parameters
from fastvq.functional.quantize import lookup
from fastvq.ops import search
from fastvq.parts.arguments import check_sizes, check_tensors
from fastvq.parts.dropout import NestedDropout
from fastvq.parts.masking import finite_mask, nan_fill
from fastvq.parts.shapes import Layout, Options
from fastvq.precision import at_least_float32

from .residual import SharedSetting
from .vector_quantize import VectorQuantize

Scale = int | Sequence[int]
SCALES: Options = {
    (True, 1): "channel_first=True, and neither accept_image_fmap nor accept_3d_fmap",
    (True, 2): "channel_first=True and accept_image_fmap=True",
    (True, 3): "channel_first=True and accept_3d_fmap=True",
    (False, 1): "channel_first=False, and neither accept_image_fmap nor accept_3d_fmap",
    (False, 2): "channel_first=False and accept_image_fmap=True",
    (False, 3): "channel_first=False and accept_3d_fmap=True",
}


class Phi(nn.Module):
    """Convolution that sharpens interpolated codes: (1 - ratio) x + ratio conv(x).

    Source: Tian et al., Visual Autoregressive Modeling (VAR), 2024, algorithm 1.
    """

    def __init__(self, dim: int, spatial_dims: int, ratio: float) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
        self.conv = kind(dim, dim, 3, padding=1)
        self.resi_ratio = abs(float(ratio))

    def forward(self, x: Tensor) -> Tensor:
        if self.resi_ratio <= 1e-8:
            return x
        return x.lerp(self.conv(x.to(self.conv.weight.dtype)).to(x.dtype), self.resi_ratio)


class HierarchicalVQ(Monitored, nn.Module):
    """Multi-scale residual quantizer with the API of vector_quantize_pytorch.

    The signal is quantized at increasing resolutions, each for the residual of the coarser ones.

        r_0 = x,   q_l = phi(up(VQ_l(pool_l(r_l)))),   r_{l+1} = r_l - q_l,   reconstruction = sum_l q_l
        loss = mean over l of the losses of VQ_l

    pool_l averages over the cells of grid l ("area") and up interpolates to the size of x. Positions that are masked
    out or not finite are excluded from the averages; the output is zero there. A cell without other positions gets
    index -1.

    Args:
        dim: dimension of the vectors.
        codebook_size: K, or one number for each scale.
        scales: the grids, each a number for all axes or one for each axis, none smaller than the one before.
        shared_codebook: all scales use one codebook, which learns from each in turn.
        channel_first: x is (B, dim, ...), else (B, ..., dim).
        quant_resi: the ratio of phi; 0 for none.
        share_quant_resi: 1: one phi for all scales; 0 or less: one for each; else this number, spread over the scales.
        interpolation: "linear", along all axes, or "cubic", for images, as in VAR.
        nested_dropout: in training, the probability that only the first scales are put out. All scales learn anyway.
        nested_dropout_min_levels: least number of scales that are put out then.
        accept_image_fmap, accept_3d_fmap: x has 2 or 3 spatial axes, else 1.
        sync_codebook, decay, commitment_weight, rotation_trick, kmeans_init, kmeans_iters, threshold_ema_dead_code,
        stochastic_sample_codes, sample_codebook_temp, orthogonal_reg_weight, orthogonal_reg_max_codes,
        orthogonal_reg_active_codes_only, freeze_codebook, kmeans_seeding: arguments of the `VectorQuantize` of each
        scale.

    State: vq, or vqs with one for each scale; phi_shared, or phi_levels.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: residuals are float32 at least; search is exact for the averages.

    Source: Tian et al., Visual Autoregressive Modeling (VAR), 2024, algorithm 1; nested dropout: Rippel et al. 2014.
    """

    decay = SharedSetting("_scales")
    commitment_weight = SharedSetting("_scales")
    sample_codebook_temp = SharedSetting("_scales")

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        scales: Sequence[Scale],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        freeze_codebook: bool = False,
        kmeans_seeding: str = "k-means++",
        interpolation: str = "linear",
    ) -> None:
        super().__init__()
        if interpolation not in ("linear", "cubic"):
            raise ValueError(f"interpolation: must be 'linear' or 'cubic', got {interpolation!r}")
        if interpolation == "cubic" and not accept_image_fmap:
            raise ValueError("interpolation: must be 'linear' without accept_image_fmap=True, got 'cubic'")
        self.interpolation = interpolation
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap, accept_3d_fmap: only one of them may be True")
        self.dim, self.channel_first = dim, channel_first
        self.spatial_dims = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        if not isinstance(scales, Sequence) or isinstance(scales, str):
            raise ValueError(f"scales: must be a sequence with a grid for each, got {scales!r}")
        self.scales = tuple(scales)
        self.level_shapes = tuple(self._shape("scales", scale) for scale in scales)
        self.num_levels = len(self.level_shapes)
        if not self.level_shapes or min(map(min, self.level_shapes)) < 1:
            raise ValueError(f"scales: must be at least one, of positive sizes, got {self.scales}")
        for coarse, fine in zip(self.level_shapes, self.level_shapes[1:], strict=False):
            if any(a > b for a, b in zip(coarse, fine, strict=True)):
                raise ValueError(f"scales: must not shrink from one to the next, got {self.scales}")
        sizes = (codebook_size,) * self.num_levels if isinstance(codebook_size, int) else tuple(codebook_size)
        if len(sizes) != self.num_levels or (shared_codebook and len(set(sizes)) > 1):
            like = "one number" if shared_codebook else f"one number, or one for each of {self.num_levels} scales"
            raise ValueError(f"codebook_size: must be {like}, got {codebook_size}")
        self.codebook_sizes = sizes
        self.nested_dropout, self.nested_dropout_min_levels = nested_dropout, nested_dropout_min_levels
        self._dropout.check()

        settings: dict[str, Any] = {
            "dim": dim,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
            "sync_codebook": sync_codebook,
            "kmeans_seeding": kmeans_seeding,
            "freeze_codebook": freeze_codebook,
        }
        self.vq: VectorQuantize | None = None
        self.vqs: nn.ModuleList | None = None
        if shared_codebook:
            self.vq = VectorQuantize(codebook_size=sizes[0], **settings)
            self.vq._history = History(REMEMBERED * self.num_levels)
        else:
            self.vqs = nn.ModuleList([VectorQuantize(codebook_size=size, **settings) for size in sizes])

        self.phi_shared: Phi | None = None
        self.phi_levels: nn.ModuleList | None = None
        if share_quant_resi == 1:
            self.phi_shared = Phi(dim, self.spatial_dims, quant_resi)
        else:
            phis = self.num_levels if share_quant_resi <= 0 else min(self.num_levels, int(share_quant_resi))
            self.phi_levels = nn.ModuleList([Phi(dim, self.spatial_dims, quant_resi) for _ in range(phis)])

    @property
    def _dropout(self) -> NestedDropout:
        return NestedDropout(self.num_levels, self.nested_dropout, self.nested_dropout_min_levels)

    @property
    def _health(self) -> Health:  # type: ignore[override]
        return cast(VectorQuantize, self.vq)._health

    @property
    def _monitored(self) -> list[Monitored] | None:
        return None if self.vqs is None else [cast(Monitored, vq) for vq in self.vqs]

    @property
    def _scales(self) -> list[VectorQuantize]:
        return [self.get_vq(level) for level in range(self.num_levels)]

    @property
    def freeze_codebook(self) -> bool:
        """True if the codebooks of all scales are frozen; assigning sets it for each of them."""
        return all(self.get_vq(level).freeze_codebook for level in range(self.num_levels))

    @freeze_codebook.setter
    def freeze_codebook(self, frozen: bool) -> None:
        for level in range(self.num_levels):
            self.get_vq(level).freeze_codebook = frozen

    def _parts(self) -> Iterator[Monitored]:
        return (self.get_vq(level) for level in range(self.num_levels))

    @property
    def _synchronizes(self) -> bool:
        return self.get_vq(0)._synchronizes

    def get_vq(self, level_index: int) -> VectorQuantize:
        """Return the quantizer of a scale."""
        return cast(VectorQuantize, self.vq if self.vqs is None else self.vqs[level_index])

    def choose_phi(self, level_index: int) -> Phi:
        """Return the phi of a scale."""
        if self.phi_levels is None:
            return cast(Phi, self.phi_shared)
        place = level_index / max(self.num_levels - 1, 1)
        return cast(Phi, self.phi_levels[round(place * (len(self.phi_levels) - 1))])

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            indices: None = None,
            mask: Tensor | None = None,
            lens: Tensor | None = None,
            sample_codebook_temp: float | None = None,
            return_cutoff: Literal[False] = False,
            *,
            freeze_codebook: bool | None = None,
            accum_ema_update: bool = False,
        ) -> tuple[Tensor, list[Tensor], Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_cutoff: Literal[True], **options: Any
        ) -> tuple[Tensor, list[Tensor], Tensor, int | Tensor | None]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
        *,
        freeze_codebook: bool | None = None,
        accum_ema_update: bool = False,
    ) -> tuple[Any, ...]:
        """Return (reconstruction, indices, loss) of x, and on request the cutoff of nested dropout.

        Args:
            x: (B, dim, ...) or, if not channel_first, (B, ..., dim), with the number of spatial axes of the layer.
            indices: must be None; `get_output_from_indices` takes indices.
            mask: bool (B, ...), True for the positions that take part. lens: int (B,), the same for one spatial axis.
            sample_codebook_temp, freeze_codebook: as for `VectorQuantize`.
            accum_ema_update: keep this batch's statistics for the next update, or for `commit_ema_update`.
            return_cutoff: also return the last scale in the reconstruction, or None if all are in it; a tensor if
                nested dropout may cut in a compiled graph.

        Returns:
            reconstruction, shaped and typed as x; a tuple of int64 (B, *grid), one for each scale; loss () float32.

        Raises:
            ValueError, TypeError: an invalid argument, by name.
        """
        if indices is not None:
            raise ValueError("indices: must be None; get_output_from_indices reconstructs from them")
        layout, residual, rows_mask = self._residual(x, mask, lens)
        options = {
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "accum_ema_update": accum_ema_update,
        }

        # Drawn before the codebooks draw, since a recomputed forward does not repeat their draws.
        active = self._dropout.draw(self.training, x)
        outputs, found, losses = [], [], []
        for level, shape in enumerate(self.level_shapes):
            cells, cells_mask = self._pool(residual, rows_mask, shape)
            vq = self.get_vq(level)
            quantized, chosen, loss = vq(cells.flatten(2).transpose(1, 2), mask=cells_mask.flatten(1), **options)
            quantized = self._to_full(quantized.transpose(1, 2).unflatten(2, shape), layout.spatial, level)
            residual = residual - quantized
            outputs.append(quantized)
            found.append(chosen.unflatten(1, shape))
            losses.append(loss)
        total = sum(active.fill(level, output, 0.0) for level, output in enumerate(outputs))
        total = cast(Tensor, total).masked_fill(~rows_mask, 0)
        total = (total if self.channel_first else total.movedim(1, -1)).to(x.dtype)
        losses = [active.fill(level, loss, 0.0) for level, loss in enumerate(losses)]
        result = tie_parameters(self, (total, tuple(found), torch.stack(losses).sum() / active.number))
        all_active = isinstance(active.number, int) and active.number == self.num_levels
        return (*result, None if all_active else active.number - 1) if return_cutoff else result

    @torch.no_grad()
    def encode(self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the indices of `forward` in eval mode, without changing any state."""
        layout, residual, rows_mask = self._residual(x, mask, lens)
        found = []
        for level, shape in enumerate(self.level_shapes):
            cells, cells_mask = self._pool(residual, rows_mask, shape)
            vq = self.get_vq(level)
            chosen = vq.encode(cells.flatten(2).transpose(1, 2), cells_mask.flatten(1))
            codes = vq.get_output_from_indices(chosen).transpose(1, 2).unflatten(2, shape)
            residual = residual - self._to_full(codes, layout.spatial, level)
            found.append(chosen.unflatten(1, shape))
        return tuple(found)

    @torch.no_grad()
    def fit(
        self, batches: Iterable[Any], *, inputs: Callable[[Any], Tensor] | None = None, iterations: int = 10
    ) -> list[Fitted]:
        """Fit the codebooks to a data set, as `VectorQuantize.fit` does one codebook.

        A codebook that all scales share is fitted to the cells of all of them, each round to the residuals that its
        means leave. Codebooks of their own are fitted one after another, each of which reads the data set iterations +
        1 times. phi stays: fit again once it has learned. Arguments and errors are those of `VectorQuantize.fit`; the
        result has one for each codebook.
        """
        check_sizes(iterations=iterations)
        refuse_frozen(self.get_vq(level) for level in range(self.num_levels))
        start = passes(batches, inputs)
        if self.vq is None:
            return [
                self.get_vq(level).fit(Passes(partial(self._cells_of_scale, start, level)), iterations=iterations)
                for level in range(self.num_levels)
            ]
        codebook = self.vq._codebook

        def cells(means: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
            for x in start():
                found = self._cells(x.to(codebook.embed_avg.device), lambda _: None if means is None else means[0])
                yield torch.cat([one.flatten(0, 1) for one in found])[None], None

        fitted = fit_(codebook, cells, iterations=iterations)
        self.vq._history.clear()
        self.reset_health()
        return [fitted]

    def _cells_of_scale(self, start: Callable[[], Iterator[Tensor]], level: int) -> Iterator[Tensor]:
        """Yield the cells of a scale in one pass over a data set, given the codes of the coarser scales."""
        for x in start():
            device = self.get_vq(level)._codebook.embed_avg.device
            found = self._cells(x.to(device), lambda place: self.get_vq(place)._codebook.codes[0])
            yield list(itertools.islice(found, level + 1))[-1]

    def _cells(self, x: Tensor, codes_of: Callable[[int], Tensor | None]) -> Iterator[Tensor]:
        """Yield the cells (B, N, dim) of the residual at each scale, NaN where all of their positions are excluded.

        `codes_of` gives the codes (K, dim) of a scale, or None to subtract nothing.
        """
        layout, residual, rows_mask = self._residual(x, None, None)
        for level, shape in enumerate(self.level_shapes):
            cells, cells_mask = self._pool(residual, rows_mask, shape)
            rows = nan_fill(cells.flatten(2).transpose(1, 2), cells_mask.flatten(1))
            yield rows
            codes = codes_of(level)
            if codes is not None:
                indices = search(rows.flatten(0, 1), codes).view(len(rows), *shape)
                residual = residual - self._to_full(lookup(codes, indices).movedim(-1, 1), layout.spatial, level)

    def _residual(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> tuple[Layout, Tensor, Tensor]:
        """Return the layout, x as (B, dim, ...) in float32 at least, and the mask (B, 1, ...) of positions to quantize.

        Other positions are zero.
        """
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, spatial=(self.spatial_dims,), options=SCALES)
        finite, rows_mask = finite_mask(layout.to_rows(x)), layout.rows_mask(mask, lens)
        positions = layout.indices(finite if rows_mask is None else finite & rows_mask).unsqueeze(1)
        residual = at_least_float32(x if self.channel_first else x.movedim(-1, 1)).masked_fill(~positions, 0)
        return layout, residual, positions

    def get_output_from_indices(self, indices: Sequence[Tensor], full_shape: Scale | None = None) -> Tensor:
        """Return the reconstruction of `forward` from the indices of all scales, without a mask.

        Args:
            indices: int64 (B, *grid), one for each scale; -1 adds nothing.
            full_shape: the spatial size to reconstruct; the finest grid by default.
        """
        for one in indices:
            check_tensors(indices=one)
        grids = [tuple(level.shape[1:]) for level in indices]
        if grids != list(self.level_shapes):
            raise ValueError(f"indices: must have shapes (B, *grid) with grids {self.level_shapes}, got {grids}")
        size = self.level_shapes[-1] if full_shape is None else self._shape("full_shape", full_shape)
        outputs = []
        for level, (shape, chosen) in enumerate(zip(self.level_shapes, indices, strict=True)):
            codes = self.get_vq(level).get_output_from_indices(chosen.flatten(1))
            outputs.append(self._to_full(codes.transpose(1, 2).unflatten(2, shape), size, level))
        total = torch.stack(outputs).sum(0)
        return total if self.channel_first else total.movedim(1, -1)

    def reinitialize_(self) -> None:
        """Call `VectorQuantize.reinitialize_` of every scale, or of the shared codebook."""
        for vq in dict.fromkeys(self.get_vq(level) for level in range(self.num_levels)):
            vq.reinitialize_()

    def resize_(self, codebook_size: int) -> None:
        """Call `VectorQuantize.resize_` of every scale, or of the shared codebook."""
        for vq in dict.fromkeys(self.get_vq(level) for level in range(self.num_levels)):
            vq.resize_(codebook_size)
        self.codebook_sizes = (codebook_size,) * self.num_levels

    def commit_ema_update(self) -> None:
        """Call `VectorQuantize.commit_ema_update` of every scale, or of the shared codebook."""
        for vq in dict.fromkeys(self.get_vq(level) for level in range(self.num_levels)):
            vq.commit_ema_update()

    def _pool(self, residual: Tensor, mask: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the averages (B, dim, *shape) over each cell's positions in mask (B, 1, ...), and the mask of cells.

        A cell is in the mask if any of its positions is.
        """
        pools: tuple[Any, ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        pool = pools[self.spatial_dims - 1]
        share = pool(mask.to(residual.dtype), shape)
        cells = pool(residual.masked_fill(~mask, 0), shape) / torch.where(share > 0, share, 1)
        return cells, (share > 0).squeeze(1)

    def _to_full(self, codes: Tensor, size: tuple[int, ...], level: int) -> Tensor:
        if tuple(codes.shape[2:]) != size:
            mode = ("linear", "bilinear", "trilinear")[self.spatial_dims - 1]
            mode = "bicubic" if self.interpolation == "cubic" else mode
            codes = F.interpolate(codes, size=size, mode=mode, align_corners=False)
        return self.choose_phi(level)(codes)

    def _shape(self, name: str, scale: Scale) -> tuple[int, ...]:
        shape = tuple(scale) if isinstance(scale, Sequence) else (scale,) * self.spatial_dims
        for size in shape:
            check_sizes(**{name: size})
        if len(shape) != self.spatial_dims:
            raise ValueError(f"{name}: must have {self.spatial_dims} sizes, got {scale}")
        return shape
