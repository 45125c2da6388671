"""Lookup-free quantization: every dimension is a bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.codebook.health import LevelUse
from fastvq.parts.arguments import check_sizes, check_tensors
from fastvq.parts.binary import CosineSimLinear, on_sphere, random_rotation, soft_clamp
from fastvq.parts.gradients import straight_through
from fastvq.parts.indices import checked_indices
from fastvq.parts.losses import Entropies, binary_entropies, random_subset
from fastvq.parts.masking import exclude_non_finite, masked_mean
from fastvq.parts.projection import project_codes_out, projected_rows, rotate
from fastvq.parts.shapes import CHANNEL_FIRST, Layout
from fastvq.precision import KeepsBuffers, at_least_float32, full_precision

MOST_BITS_OF_ENTROPY = 30


class LFQOutput(NamedTuple):
    """Result of `LFQ`."""

    quantized: Tensor  # as x
    indices: Tensor  # (B, ...) or (B, ..., num_codebooks) int64
    entropy_aux_loss: Tensor  # ()


class LFQLosses(NamedTuple):
    """Terms of the loss of `LFQ`, each () and unweighted."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class LFQ(LevelUse, KeepsBuffers, nn.Module):
    """Lookup-free quantizer with the API of vector_quantize_pytorch: each dimension becomes one bit.

        y = project_in(x),   bit_d = y_d > 0,   quantized = project_out(v (2 bit - 1)),   index = sum_d bit_d 2^(D-1-d)
        loss = entropy_loss_weight (mean_n H(p_n) - diversity_gamma H(mean_n p_n))
             + commitment_loss_weight mean (y - sg[v (2 bit - 1)])^2     (zero in eval mode)

    with p_n the softmax of -inv_temperature times the squared distances to all K codes, v = codebook_scale, and on the
    sphere v = codebook_scale / sqrt(D). Vectors that are not finite or masked out get index -1 and a zero output, and
    take no part in losses and gradients.

    Args:
        dim: dimension of the vectors; by default the total number of bits of all codebooks.
        codebook_size: K = 2^D; 2^dim by default.
        entropy_loss_weight, commitment_loss_weight, diversity_gamma: weights of the losses.
        straight_through_activation: function that the gradient passes through to y.
        num_codebooks: number of independent codes of D bits per vector.
        keep_num_codebooks_dim: indices have an axis for the codebooks; by default if there are several.
        codebook_scale: v.
        frac_per_sample_entropy: share of vectors, chosen at random, that the entropies are computed from.
        has_projections: linear projections surround the bits; by default if dim differs from their number.
        projection_has_bias: whether the projections have a bias.
        soft_clamp_input_value: bound on y, by tanh, before anything else.
        cosine_sim_project_in: project_in returns cosines, times cosine_sim_project_in_scale (codebook_scale by
            default).
        channel_first: vectors are (B, dim, ...), else (B, ..., dim); None: images and video are, sequences are not.
        experimental_softplus_entropy_loss: softplus(entropy loss + entropy_loss_offset), which is positive.
        spherical: binary spherical quantization: y and the codes are put on a sphere of radius codebook_scale.
        force_quantization_f32: without effect: computation after project_in is in float32 at least.
        orthogonal_rotation: quantize in a random orthogonal basis.

    State: mask (D,) int64, the place values of the bits; orthogonal_rot (D, D), float32 in modules of any dtype.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: memory is O(N 2^(D/2) + 2^D) for the entropies and O(N D) without; with an entropy_loss_weight of 0 they
    are computed on request only. `health` counts codes up to K = 2^18, beyond that each bit.

    Source: Yu et al., Language Model Beats Diffusion, 2023, equations 3 to 5; sphere: Zhao et al., Binary Spherical
    Quantization, 2024; rotation: Chee et al., QuIP, 2023.
    """

    mask: Tensor
    orthogonal_rot: Tensor
    _kept_buffers = ("orthogonal_rot",)

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: Callable[[Tensor], Tensor] | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        if dim is None and codebook_size is None:
            raise ValueError("dim, codebook_size: at least one of them must be given")
        if codebook_size is None:
            codebook_size = 2 ** (dim or 0)
        check_sizes(codebook_size=codebook_size)
        codebook_size = int(codebook_size)
        if codebook_size < 2 or codebook_size.bit_count() != 1 or codebook_size > 2**62:
            raise ValueError(f"codebook_size: must be a power of 2 from 2 to 2^62, got {codebook_size}")
        if codebook_size > 2**MOST_BITS_OF_ENTROPY and entropy_loss_weight:
            raise ValueError(
                f"entropy_loss_weight: must be 0 beyond {MOST_BITS_OF_ENTROPY} bits, as the batch entropy is a sum over"
                f" all codes, got {entropy_loss_weight}"
            )
        check_sizes(num_codebooks=num_codebooks)
        if num_codebooks > 1 and keep_num_codebooks_dim is False:
            raise ValueError("keep_num_codebooks_dim: must not be False beside several codebooks")
        if not 0 < frac_per_sample_entropy <= 1:
            raise ValueError(f"frac_per_sample_entropy: must lie in (0, 1], got {frac_per_sample_entropy}")
        if soft_clamp_input_value is not None and not soft_clamp_input_value >= codebook_scale:
            raise ValueError(
                f"soft_clamp_input_value: must be at least codebook_scale = {codebook_scale},"
                f" got {soft_clamp_input_value}"
            )
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_size.bit_length() - 1
        self.num_codebooks = num_codebooks
        bits = self.codebook_dim * num_codebooks
        self.dim = bits if dim is None else dim
        self.has_projections = self.dim != bits if has_projections is None else has_projections
        if self.dim != bits and not self.has_projections:
            raise ValueError(f"has_projections: must be True where dim isn't {bits}, the bits of a vector, got {dim}")

        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            if cosine_sim_project_in:
                scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
                self.project_in = CosineSimLinear(self.dim, bits, scale=scale)
            else:
                self.project_in = nn.Linear(self.dim, bits, bias=projection_has_bias)
            self.project_out = nn.Linear(bits, self.dim, bias=projection_has_bias)

        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.channel_first = channel_first
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", random_rotation(self.codebook_dim))
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.entropy_loss_offset = entropy_loss_offset
        self.force_quantization_f32 = force_quantization_f32

        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self._dtype = torch.get_default_dtype()
        self._count_levels([2] * self.codebook_dim, None if num_codebooks == 1 else num_codebooks)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of decoded codes."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._dtype = fn(torch.zeros(1, dtype=self._dtype)).dtype
        return super()._apply(fn, recurse)

    @property
    def codebook(self) -> Tensor:
        """All codes (K, D) with coordinates -codebook_scale and codebook_scale, computed on access.

        They are not yet on the sphere or rotated, as those of `indices_to_codes` are.
        """
        return self.bits_to_codes(self.indices_to_bits(torch.arange(self.codebook_size, device=self.mask.device)))

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Return codebook_scale (2 bits - 1)."""
        bits = bits if bits.is_floating_point() else bits.to(self.dtype)
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def indices_to_bits(self, indices: Tensor) -> Tensor:
        """Return the bits (..., D) bool of indices (...), highest bit first."""
        return (indices.unsqueeze(-1) & self.mask) != 0

    def bits_to_indices(self, bits: Tensor) -> Tensor:
        """Return the indices (...) int64 of bits (..., D) bool."""
        return torch.where(bits, self.mask, 0).sum(-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes (..., D) of one codebook's indices (...), zeros for -1."""
        codes = self._place(self._signs(self.indices_to_bits(indices)))
        return codes.masked_fill((indices < 0).unsqueeze(-1), 0).to(self.dtype)

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Return the output of `forward` for these indices, in its layout; zeros for -1.

        Args:
            indices: int64 (B, ...), or (B, ..., num_codebooks) if they have that axis.
            project_out: if False, return the codes themselves, D coordinates for each codebook.
        """
        indices = checked_indices(indices, self.codebook_size)
        if not self.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        codes = self.codes(indices).flatten(-2)
        if project_out:
            codes = project_codes_out(self.project_out, codes, (indices >= 0).any(-1))
        images = indices.dim() >= 4  # with the axis of the codebooks
        channel_first = images if self.channel_first is None else self.channel_first
        return codes.movedim(-1, 1) if channel_first else codes

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            inv_temperature: float = 100.0,
            return_loss_breakdown: Literal[False] = False,
            mask: Tensor | None = None,
            *,
            lens: Tensor | None = None,
        ) -> LFQOutput: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_loss_breakdown: Literal[True], **options: Any
        ) -> tuple[LFQOutput, LFQLosses]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> LFQOutput | tuple[LFQOutput, LFQLosses]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        inv_temperature: float | Tensor = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
    ) -> LFQOutput | tuple[LFQOutput, LFQLosses]:
        """Return (quantized, indices, entropy_aux_loss) of x.

        Args:
            x: (B, N, dim), images (B, dim, H, W), video (B, dim, T, H, W), single vectors (B, dim); see channel_first.
            inv_temperature: inverse temperature of the assignments in the entropies; a number or a tensor ().
            return_loss_breakdown: also return the terms of the loss.
            mask: bool, True for the vectors that take part: (B,), (B, N) or (B, spatial).
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.

        Returns:
            quantized, shaped and typed as x; indices int64; entropy_aux_loss () float32. Then `LFQLosses`.

        Raises:
            ValueError, TypeError: x or mask of another shape or dtype.
        """
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = rows_and_mask(layout, x, mask, lens)
        quantized, indices, loss, parts = self.quantize_rows(
            projected_rows(self.project_in, rows),
            rows_mask,
            inv_temperature=inv_temperature,
            entropies=return_loss_breakdown,
        )
        quantized = layout.from_rows(project_codes_out(self.project_out, quantized, rows_mask).to(x.dtype))
        indices = layout.indices(indices if self.keep_num_codebooks_dim else indices.squeeze(-1))
        result = LFQOutput(quantized, indices, loss)
        return (result, parts) if return_loss_breakdown else result

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, *, lens: Tensor | None = None) -> Tensor:
        """Return the indices of `forward` in eval mode, without changing any state."""
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = rows_and_mask(layout, x, mask, lens)
        _, indices = self.nearest_rows(projected_rows(self.project_in, rows), rows_mask)
        return layout.indices(indices if self.keep_num_codebooks_dim else indices.squeeze(-1))

    def quantize_rows(
        self, y: Tensor, mask: Tensor, *, inv_temperature: float | Tensor = 100.0, entropies: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, LFQLosses]:
        """Return quantized (..., C D), indices (..., C), loss and its terms for y (..., C D).

        This is `forward` between the projections. mask: bool (...), the rows that take part. entropies: compute them
        even without weight.
        """
        with full_precision(y):
            y, mask, bits = self._bits(y, mask)
            codes = self._signs(bits).to(y.dtype)
            indices = self.bits_to_indices(bits).masked_fill(~mask.unsqueeze(-1), -1)
            loss, parts = self._losses(y, codes, mask, inv_temperature, entropies)
            if self.training or self._measures:
                error = masked_mean((y - codes).detach().square().flatten(-2), mask)
                self._observe(indices.flatten(0, -2).T, bits, mask.unsqueeze(-1), error)
            if self.training:
                codes = straight_through(self.activation(y), codes)
            codes = self._place(codes).masked_fill(~mask[..., None, None], 0)
        return codes.flatten(-2), indices, loss, parts

    def nearest_rows(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (..., C D) and indices (..., C) of y (..., C D), as `quantize_rows` in eval mode."""
        with full_precision(y):
            y, mask, bits = self._bits(y, mask)
            codes = self._place(self._signs(bits).to(y.dtype)).masked_fill(~mask[..., None, None], 0)
        return codes.flatten(-2), self.bits_to_indices(bits).masked_fill(~mask.unsqueeze(-1), -1)

    def _bits(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y (..., C D) as it is compared with the codes, (..., C, D), the mask of its finite rows, and bits."""
        y, mask = exclude_non_finite(at_least_float32(y), mask)
        if self.soft_clamp_input_value is not None:
            y = soft_clamp(y, self.soft_clamp_input_value)
        y = y.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            y = rotate(y, self.orthogonal_rot).to(y.dtype)
        if self.spherical:
            y = on_sphere(y, self.codebook_scale)
        return y, mask, y > 0

    def _losses(
        self, y: Tensor, codes: Tensor, mask: Tensor, inv_temperature: float | Tensor, entropies: bool
    ) -> tuple[Tensor, LFQLosses]:
        zero = y.new_zeros(())
        found, entropy_loss, commitment = Entropies(zero, zero), zero, zero
        if self.training and (entropies or self.entropy_loss_weight):
            rows = y.flatten(0, -3)
            sampled = random_subset(mask.flatten(), self.frac_per_sample_entropy)
            found = binary_entropies(rows, sampled, sharpness=2 * inv_temperature * self._coordinate)
            entropy_loss = found.per_sample - self.diversity_gamma * found.batch
            if self.experimental_softplus_entropy_loss:
                entropy_loss = F.softplus(entropy_loss + self.entropy_loss_offset)
        if self.training and self.commitment_loss_weight > 0:
            commitment = masked_mean((y - codes).square().flatten(-2), mask)
        loss = entropy_loss * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        return loss, LFQLosses(found.per_sample, found.batch, commitment)

    @property
    def _coordinate(self) -> float:
        """v: codes have coordinates -v and v."""
        return self.codebook_scale / math.sqrt(self.codebook_dim) if self.spherical else self.codebook_scale

    def _signs(self, bits: Tensor) -> Tensor:
        return torch.where(bits, self._coordinate, -self._coordinate)

    def _place(self, codes: Tensor) -> Tensor:
        """Rotate codes (..., D) from the basis of the bits to that of y."""
        return rotate(codes, self.orthogonal_rot.T).to(codes.dtype) if self.orthogonal_rotation else codes


def rows_and_mask(layout: Layout, x: Tensor, mask: Tensor | None, lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x as rows (B, N, dim), zero where excluded, and the mask (B, N) of finite rows in `mask`.

    `mask` has the shape (B, N), (B, spatial) or leading axes of it.
    """
    if mask is not None:
        check_tensors(mask=mask)
    leading = (layout.batch, *layout.spatial)
    if mask is not None and mask.shape == leading[: mask.dim()]:
        mask = mask.reshape(*mask.shape, *[1] * (len(leading) - mask.dim())).expand(leading)
    elif mask is not None and mask.shape == (layout.batch, layout.rows):
        mask = mask.reshape(leading)
    return exclude_non_finite(layout.to_rows(x), layout.rows_mask(mask, lens))
