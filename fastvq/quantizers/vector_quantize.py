"""The single-codebook vector quantizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codebook import Codebook, Revival
from ..functional import lookup, quantize, unit_norm
from ..health import Health, Monitored
from ..parts.layout import Layout, codes_layout


class VectorQuantize(Monitored, nn.Module):
    """Replaces each vector by its nearest code and learns the codebook, with the API of vector_quantize_pytorch.

        quantized = project_out(e_index),   index = argmin_k |project_in(x) - e_k|^2
        loss = commitment_weight * mean (project_in(x) - sg[e_index])^2     (zero in eval)

    In training the codebook follows the exponential moving averages of its vectors (`fastvq.ema_update_`), or the
    gradient if it is learnable; the output is always that of the codebook from before the update. Vectors that are not
    finite get index -1 and a zero output, and touch neither loss nor codebook.

    Args:
        dim: dimension of the vectors that come in and go out.
        codebook_size: K.
        codebook_dim: D, the dimension of the codes; linear projections stand around the codebook where it isn't dim.
        decay: of the moving averages, in [0, 1].
        eps: Laplace smoothing of the cluster sizes.
        commitment_weight: beta; 0 for no loss.
        kmeans_init: set the codebook by k-means on the first training batch; until then it is zero.
        kmeans_iters: rounds of that k-means.
        use_cosine_sim: compare directions: x and the codes are normalised and the largest product wins.
        threshold_ema_dead_code: codes whose moving cluster size falls below it are put on random vectors of the batch;
            0 for never.
        freeze_codebook: leave the codebook as it is, bit for bit, in training too.
        learnable_codebook: the codebook is a parameter and the loss pulls it to the vectors by the same weight.
        ema_update: use the moving averages; by default wherever the codebook isn't learnable.
        rotation_trick: estimate the gradient by the rotation trick, else straight through; by default where dim > 1.
        channel_last: vectors are (B, N, dim); if False, (B, dim, N).
        accept_image_fmap: x is (B, dim, H, W).

    Raises:
        ValueError: an argument, or a pair of arguments, that can't be; it is named.
        TypeError: an argument that doesn't exist, or doesn't yet.

    Numerics: search is exact (`fastvq.search`); codebook and statistics are float32 whatever dtype the module, x or
    autocast has.

    Source: van den Oord et al. 2017; rotation trick: Fifty et al. 2024; revival: Dhariwal et al., Jukebox, 2020.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        commitment_weight: float = 1.0,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        freeze_codebook: bool = False,
        learnable_codebook: bool = False,
        ema_update: bool | None = None,
        rotation_trick: bool | None = None,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
    ) -> None:
        super().__init__()
        ema_update = not learnable_codebook if ema_update is None else ema_update
        codebook_dim = dim if codebook_dim is None else codebook_dim
        for name, value in (("dim", dim), ("codebook_size", codebook_size), ("codebook_dim", codebook_dim)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: must be an integer of at least 1, got {value!r}")
        for name, number in (
            ("eps", eps),
            ("commitment_weight", commitment_weight),
            ("kmeans_iters", kmeans_iters),
            ("threshold_ema_dead_code", threshold_ema_dead_code),
        ):
            if not number >= 0:
                raise ValueError(f"{name}: must not be negative, got {number}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: must lie in [0, 1], got {decay}")
        if learnable_codebook and ema_update:
            raise ValueError("ema_update: must be False beside learnable_codebook=True: one of them moves the codebook")
        if learnable_codebook and use_cosine_sim:
            raise ValueError("learnable_codebook: must be False beside use_cosine_sim=True")

        self.dim, self.codebook_size, self.codebook_dim = dim, codebook_size, codebook_dim
        self.commitment_weight = commitment_weight
        self.freeze_codebook = freeze_codebook
        self.learnable_codebook = learnable_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.use_cosine_sim = use_cosine_sim
        self.channel_last, self.accept_image_fmap = channel_last, accept_image_fmap

        projects = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projects else nn.Identity()
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            revival=Revival(threshold_ema_dead_code),
            cosine=use_cosine_sim,
            learnable=learnable_codebook,
            ema_update=ema_update,
        )
        self._health = Health(codebook_size)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D), float32. Assigning sets them, as unit vectors for cosine similarity, with moving averages
        that agree; k-means then has nothing to do."""
        return self._codebook.codes[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        shape = (self.codebook_size, self.codebook_dim)
        if codes.shape != shape:
            raise ValueError(f"codebook: must have shape (K, D) = {shape}, got {tuple(codes.shape)}")
        self._codebook.set_(codes[None])

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(quantized, indices, loss) of x.

        Args:
            x: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, N) if not channel_last; (B, dim, H, W) if
                accept_image_fmap. Any floating dtype.
            mask: bool, shaped as the indices, True for the vectors that count. The others cost nothing in the loss,
                touch no codebook and come back as index -1 and zero.
            lens: int (B,), the same for sequences: the first lens[b] vectors count.
            freeze_codebook: for this call, instead of the layer's own.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, N), (B,), (B, ...) or (B, H, W); loss () float32.

        Raises:
            ValueError, TypeError: x, mask or lens that don't fit.
        """
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        layout = self._layout(x)
        rows_mask = layout.rows_mask(mask, lens)
        projected = self._project_in(layout.to_rows(x))
        quantized, indices, loss = self.quantize_rows(projected, rows_mask, learning=self.training and not frozen)
        quantized = self._project_out(quantized, indices).to(x.dtype)
        return layout.from_rows(quantized), layout.indices(indices), loss

    def quantize_rows(
        self, x: Tensor, mask: Tensor | None, *, learning: bool, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` between the projections: vectors (..., D), a bool mask (...) or None, and the indices (...) where
        these are known already. `learning` is whether the codebook is updated."""
        if learning:
            self._codebook.initialise_(x.detach().flatten(0, -2)[None], None if mask is None else mask.flatten()[None])
        quantized, indices, loss, error = self._quantize(x, mask, learning, indices)
        if self.training:
            self._health.observe_(indices.flatten(), error)
            if learning:
                self._codebook.learn_(x.detach().flatten(0, -2)[None], indices.flatten()[None])
        return quantized, indices, loss

    def _quantize(
        self, x: Tensor, mask: Tensor | None, learning: bool, indices: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantized, indices, loss, and the mean squared error whatever its weight in the loss is."""
        pulled = self.learnable_codebook and learning
        # In eval nothing flows back, as in vector_quantize_pytorch.
        quantized, indices, loss = quantize(
            x if self.training else x.detach(),
            self.codebook if pulled else self.codebook.detach(),
            metric=self._codebook.metric,
            gradient="rotation" if self.rotation_trick else "ste",
            commitment_weight=1.0,
            codebook_weight=1.0 if pulled else 0.0,
            mask=mask,
            indices=indices,
        )
        if pulled:  # both losses are one mean with both sides free: its value is counted once
            loss = loss - loss.detach() / 2
        error = loss.detach()
        loss = loss * self.commitment_weight if self.training and self.commitment_weight else torch.zeros_like(error)
        if pulled and not x.requires_grad:  # no encoder to pass the gradient to: the codes take it
            quantized = lookup(self.codebook, indices).to(x.dtype)
        return quantized, indices, loss, error

    def encode(self, x: Tensor) -> Tensor:
        """The indices alone, shaped as `forward` returns them. Touches no state, in training neither."""
        layout = self._layout(x)
        projected = self._project_in(layout.to_rows(x))
        return layout.indices(self._codebook(projected.flatten(0, -2)[None]).reshape(projected.shape[:-1]))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes (..., D) of indices (...), zeros for -1; channels first, (B, D, ...), where the layer is."""
        return codes_layout(lookup(self.codebook, indices), self._channel_first)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives as quantized for these indices, in float32 or the projection's dtype."""
        return codes_layout(self._project_out(lookup(self.codebook, indices), indices), self._channel_first)

    def _project_in(self, rows: Tensor) -> Tensor:
        projected = self.project_in(rows)
        return unit_norm(projected.float()) if self.use_cosine_sim else projected

    def _project_out(self, codes: Tensor, indices: Tensor) -> Tensor:
        if not isinstance(self.project_out, nn.Linear):
            return codes
        projected = self.project_out(codes.to(self.project_out.weight.dtype))
        return projected.masked_fill((indices < 0).unsqueeze(-1), 0)  # else the bias would stand where no code does

    @property
    def _channel_first(self) -> bool:
        return self.accept_image_fmap or not self.channel_last

    def _layout(self, x: Tensor) -> Layout:
        spatial = (2,) if self.accept_image_fmap else (0, 1) if not self.channel_last else None
        return Layout.of(x, self.dim, channel_first=self._channel_first, spatial=spatial)
