"""`fastvq.load`: the trained models of a run as one object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.data.examples import to_float
from fastvq.errors import CheckpointError, ConfigError, MissingExtraError
from fastvq.files import StrPath
from fastvq.modalities import TrainConfig, modality_of
from fastvq.models import VQVAE, ContrastiveModel, Prior
from fastvq.training.checkpoint import checkpoint_folders, is_checkpoint, load_checkpoint
from fastvq.training.loop import usable_device

from .contrast import check_text, load_contrastive, similarity
from .load import PRIOR_FOLDER, checkpoint_model, conditions, label_number, load_model, load_prior_of, text_row

if TYPE_CHECKING:
    from typing_extensions import Self

_BATCH = 100
_AXES = {1: ["T"], 2: ["h", "w"], 3: ["t", "h", "w"]}
_SIZES = {1: ["T"], 2: ["H", "W"], 3: ["T", "H", "W"]}
"""Names of the axes of a grid and of a signal, by their number."""


class TrainedModel(nn.Module):
    """VQ-VAE of a run, with its prior if it has one: images to indices and back, and new images.

    A run of another modality takes clips of audio or video in their place. The model is in eval mode, and nothing that
    it does learns or records gradients. Signals are moved to its device; what it returns is there.

    Args:
        vqvae: the VQ-VAE.
        config: the settings that it was trained with.
        prior: the prior over its indices, or None.
        no_prior: why there is none.
        contrastive: the contrastive model of images and captions, or None.
        no_contrastive: why there is none.

    Attributes:
        vqvae, config, prior, no_prior, contrastive, no_contrastive: see Args.
        modality: what the run is trained on.
        channels: channels of a signal: 1 for gray images, 3 for images in color.
        strides, first: the sizes of a signal are `first` plus multiples of `strides`, axis by axis; the first frame of
            a video has positions of its own, all other axes have only multiples.
    """

    def __init__(
        self,
        vqvae: VQVAE,
        config: TrainConfig,
        prior: Prior | None = None,
        contrastive: ContrastiveModel | None = None,
        *,
        no_prior: str = "there is no prior",
        no_contrastive: str = "there is no contrastive model",
    ) -> None:
        super().__init__()
        self.vqvae, self.config, self.prior, self.contrastive = vqvae, config, prior, contrastive
        self.modality = modality_of(config.modality)
        self.channels = config.example_format.shape[0]
        self.strides, self.first = vqvae.strides, vqvae.first
        self.no_prior, self.no_contrastive = no_prior, no_contrastive
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights; `to` moves them."""
        return next(self.vqvae.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode: a codebook would change with every image that is encoded."""
        if mode:
            raise ValueError("a trained model stays in eval mode: train .vqvae or .prior instead")
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `reconstruct(x)`."""
        return self.reconstruct(x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the indices of signals, int64: (B, *grid), or (B, *grid, Q) with Q stages, heads or groups.

        Those of images are (B, h, w). Those of several scales are (B, T), all in a row.

        Args:
            x: (B, C, *size) in the stored dtype, or floats: images (B, C, H, W), uint8 or in [0, 1]; video
                (B, C, T, H, W) likewise; audio (B, C, T), int16 or in [-1, 1]. For sizes see `strides`; the model
                knows best what looks like the examples that it learned from, in size as well.

        Raises:
            TypeError, ValueError: signals of another shape, dtype or range; the message says what they may be.
            ConfigError: the run was trained without a bottleneck.
        """
        self._check_indices()
        return self.vqvae.encode(self._checked(x))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Return the signals (B, C, *size), float32 in their range, of indices as `encode` returns them.

        Of separate autoencoders at several scales, as those of Jukebox, the indices of the coarsest scales suffice.

        Raises:
            TypeError, ValueError: indices of another shape, dtype or range.
            ConfigError: the run was trained without a bottleneck.
        """
        self._check_indices()
        _check_tensor("indices", indices)
        adapter = self.vqvae.adapter
        own, axes = adapter.index_shape(self.config.feature_grid), len(self.config.feature_grid)
        whole = adapter.scales is not None  # all in a row
        fixed = own if whole else own[axes:]
        if indices.dim() == 2 and indices.shape[1] in adapter.leading:
            fixed = tuple(indices.shape[1:])
        if indices.dim() != 1 + len(own) or indices.shape[indices.dim() - len(fixed) :] != fixed:
            free = [] if whole else _AXES[axes]
            expected = f"({', '.join(map(str, ['B', *free, *fixed]))})"
            raise ValueError(f"indices: must be {expected}, got {tuple(indices.shape)}")
        return self.vqvae.restore(indices.to(self.device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return signals as they are decoded from their indices, float32 in their range; see `encode`.

        Without a bottleneck, they are decoded from the features.
        """
        return self.vqvae.reconstruct(self._checked(x))

    @torch.no_grad()
    def sample(
        self,
        count: int = 1,
        *,
        label: int | str | None = None,
        text: str | None = None,
        rerank: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        given: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Return new signals (count, C, *size), float32 in their range, decoded from samples of the prior.

        Args:
            count: number of signals.
            label: their class, by number or by name; by default each class in turn, if the prior has classes and
                nothing is given.
            text: what they show, for a prior that was trained on captions; by default they follow none.
            rerank: number of samples that are drawn, at least `count`: the ones that the contrastive model of the run
                finds most similar to the text are returned, the most similar first. By default all that are drawn.
            temperature, top_k, top_p, guidance: see `fastvq.models.Prior.sample`.
            given: indices to keep, (count, *grid), or (1, *grid) for all, with -1 at the places to sample: those that
                `encode` returns for a signal, of which the beginning is kept, are continued.
            seed: equal seeds give equal samples, on equal devices; by default torch's random state decides.

        Raises:
            CheckpointError: the run has no prior or, to rank samples, no contrastive model, or none that can be read;
                the message says which command learns one.
            ValueError: an invalid argument, by name.
        """
        prior = self.prior
        if prior is None:
            raise CheckpointError(self.no_prior)
        if count < 1:
            raise ValueError(f"count: must be at least 1, got {count}")
        check_text(text, label=label, rerank=rerank, count=count)
        label, row = label_number(prior, label), text_row(prior, text)
        ranking = self.contrastive if rerank is not None else None
        if rerank is not None and ranking is None:
            raise CheckpointError(self.no_contrastive)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        sampled, drawn = [], rerank or count
        if given is not None:
            if given.shape[:1] not in ((1,), (drawn,)):
                raise ValueError(f"given: must be indices of 1 or {drawn} signals, got {tuple(given.shape)}")
            given = given.expand(drawn, *given.shape[1:])
        for first in range(0, drawn, _BATCH):
            number = min(_BATCH, drawn - first)
            labels = conditions(prior, first, number, label, row, in_turn=given is None)
            labels = None if labels is None else labels.to(self.device)
            own = None if given is None else given[first : first + number]
            indices = prior.sample(number, labels, given=own, generator=generator, **settings)  # type: ignore[arg-type]
            sampled.append(self.decode(indices))
        signals = torch.cat(sampled)
        if ranking is None or text is None:
            return signals
        return signals[similarity(ranking, self.modality.as_images(signals, self.config), text).topk(count).indices]

    def extra_repr(self) -> str:
        """Return what the model takes, for `repr`."""
        return f"{self.modality.noun[1]} {self._shape_text()}"

    def _shape_text(self) -> str:
        """Return the shapes of signals as text, such as "(B, 1, H, W) with H and W multiples of 4"."""
        names = _SIZES[len(self.strides)]
        rules: dict[tuple[int, int], list[str]] = {}
        for name, stride, first in zip(names, self.strides, self.first, strict=True):
            rules.setdefault((stride, first), []).append(name)
        texts = []
        for (stride, first), own in rules.items():
            joined = own[0] if len(own) == 1 else f"{', '.join(own[:-1])} and {own[-1]}"
            multiple = "a multiple" if len(own) == 1 or first else "multiples"
            texts.append(f"{joined} {f'{first} plus ' if first else ''}{multiple} of {stride}")
        rule = ", ".join(texts)
        return f"(B, {self.channels}, {', '.join(names)}) with {rule}"

    def _check_indices(self) -> None:
        if self.config.without_indices:
            raise ConfigError(f"bottleneck: this run {self.config.without_indices}; reconstruct works")

    def _checked(self, x: Tensor) -> Tensor:
        """Return signals as floats on the device.

        Raises:
            ValueError: see `encode`.
        """
        many = self.modality.noun[1]
        _check_tensor(many, x)
        low, high = self.vqvae.value_range
        dtype = self.modality.reader.dtype
        learned = " x ".join(map(str, self.config.example_format.shape[1:]))
        expected = (
            f"{many}: must be {dtype}, or floats in [{low:g}, {high:g}], of shape {self._shape_text()}, such as the"
            f" {learned} that the model learned from"
        )
        given = f"{tuple(x.shape)} {x.dtype}"
        sizes = x.shape[2:]
        fit = len(sizes) == len(self.strides) and all(
            n > 0 and (n - first) % stride == 0
            for n, stride, first in zip(sizes, self.strides, self.first, strict=True)
        )
        if not fit or x.shape[1] != self.channels:
            raise ValueError(f"{expected}; got {given}" + self._advice(x))
        x = x.to(self.device)
        if str(x.dtype) == f"torch.{dtype}":
            return to_float(x)
        if not x.is_floating_point():
            raise ValueError(f"{expected}; got {given}")
        if x.numel() and not (x.min() >= low and x.max() <= high):
            raise ValueError(f"{expected}; got values from {x.min().item():g} to {x.max().item():g}")
        return x.to(next(self.vqvae.parameters()).dtype)

    def _advice(self, x: Tensor) -> str:
        """Return what makes a tensor a batch of signals, where that is clear."""
        many, axes = self.modality.noun[1].split()[-1], 2 + len(self.strides)
        if x.dim() == axes - 1 and x.shape[0] == self.channels:
            return f": {many}[None] is a batch of one"
        if axes != 4:
            return ""
        if x.dim() == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
            return ": images.permute(0, 3, 1, 2) puts the channels first"
        if x.dim() == 4 and (x.shape[1], self.channels) == (1, 3):
            return ": images.expand(-1, 3, -1, -1) has three channels"
        if x.dim() == 4 and (x.shape[1], self.channels) == (3, 1) and x.is_floating_point():
            return ": images.mean(1, keepdim=True) is gray"
        return ""


def load(run: StrPath, *, device: str | torch.device = "cpu") -> TrainedModel:
    """Return the trained models of a run as one object that encodes, decodes, reconstructs and samples.

    A RuntimeWarning says so if a training is unfinished.

    Args:
        run: folder of a run, as `fastvq train --out` writes it, whose latest checkpoint is taken; or the folder of one
            checkpoint, such as `runs/mine/checkpoints/step-00003600` or a copy of it.
        device: torch device of the models.

    Raises:
        CheckpointError: there is no run, or its checkpoint is damaged; the message names the folder.
        ConfigError: the device cannot be used.
    """
    target = usable_device(str(device))
    run = Path(run)
    folder: Path | None
    if is_checkpoint(run):
        if run.parent.parent.name == PRIOR_FOLDER and checkpoint_folders(run.parent.parent.parent):
            _refuse_prior(run.parent.parent)
        checkpoint = load_checkpoint(run)
        vqvae, config = checkpoint_model(checkpoint), checkpoint.config
        parent = run.resolve().parent
        folder = parent.parent if parent.name == "checkpoints" else None
    else:
        folder = run
        if run.name == PRIOR_FOLDER and checkpoint_folders(run.parent):
            _refuse_prior(run)
        vqvae, config = load_model(run)
    prior, no_prior = None, f"{run} is a checkpoint away from its run, which has the prior"
    contrastive, no_contrastive = None, f"{run} is a checkpoint away from its run, which has the contrastive model"
    if folder is not None:
        try:
            prior = load_prior_of(folder, vqvae)
        except (CheckpointError, MissingExtraError) as error:
            no_prior = str(error)
        try:
            contrastive = load_contrastive(folder, vqvae)
        except (CheckpointError, MissingExtraError) as error:
            no_contrastive = str(error)
    return TrainedModel(vqvae, config, prior, contrastive, no_prior=no_prior, no_contrastive=no_contrastive).to(target)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(value).__name__}")


def _refuse_prior(folder: Path) -> None:
    """Raise a CheckpointError that names the run whose prior was given as a run."""
    raise CheckpointError(f"{folder} is the prior of the run {folder.parent}: load that one, with its prior")
