"""Training a VQ-VAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastvq
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.errors import DataError
from fastvq.models import VQVAE

from .batches import batch_rows, flip_some, moved
from .build import build_model
from .config import TrainConfig
from .evaluation import Evaluation, evaluate, psnr_db
from .loop import Loop, Measures, usable_device

OnEvaluation = Callable[["Trainer", Evaluation], object]


class Trainer(Loop):
    """Train one VQ-VAE in one folder; see `Loop` for what a run is, and how it resumes.

        loss = mean((reconstruction - x)^2) / reconstruction_variance + the bottleneck's loss

    Data order and flips depend on seed and step alone. The constructor sets torch's global random state.

    Args:
        config: the settings.
        images: the data set, as `load_images(config)` gives it.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        resume: go on from the latest checkpoint in `folder`, with the same settings and data.

    Raises:
        DataError: the images don't fit the settings.
        CheckpointError: `resume` and there is no checkpoint, it is damaged, or the data are others; not `resume` and
            the folder already holds a run.
        ConfigError: `resume` and the settings differ from the checkpoint's; the device isn't there.
    """

    config: TrainConfig
    model: VQVAE

    def __init__(self, config: TrainConfig, images: Images, folder: Path, *, resume: bool = False) -> None:
        if config.batch_size > len(images.train):
            raise DataError(f"batch_size {config.batch_size} is more than the {len(images.train)} training images")
        self.images = images
        self.device = usable_device(config.device)
        torch.manual_seed(config.seed)
        # With channels last the grid's vectors reach the quantizer without a copy: a quarter of a CPU step's time.
        model = build_model(config).to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._quantizer = model.bottleneck if isinstance(model.bottleneck, fastvq.VectorQuantize) else None
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        super().__init__(config, model, optimizer, folder, identity=images.fingerprint())
        self._train_images = images.train.to(self.device)
        self.begin(resume=resume)

    def learn(self) -> None:
        config = self.config
        rows = batch_rows(self.step, count=len(self._train_images), batch_size=config.batch_size, seed=config.seed)
        x = to_float(self._train_images[moved(rows, self.device)])
        if config.flip:
            x = flip_some(x, self.step, seed=config.seed)
        output = self.model(x)
        squared_error = (output.reconstruction - x).square().mean()
        loss = squared_error / config.reconstruction_variance + output.loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._window += torch.stack([loss.detach(), squared_error.detach(), torch.ones_like(loss)])

    def recent(self) -> tuple[Measures, str]:
        loss, squared_error = (self._window[:2] / self._window[2]).tolist()
        values: Measures = {"loss": loss, "psnr_db": psnr_db(squared_error)}
        text = f"loss {loss:.3f}, PSNR {psnr_db(squared_error):.2f} dB"
        if self._quantizer is not None:
            counts = self._quantizer.code_counts
            perplexity = float(fastvq.perplexity(counts))
            values |= {"perplexity": perplexity, "usage": float(fastvq.usage(counts))}
            self._quantizer.reset_health()
            text += f", perplexity {perplexity:.0f}"
        return values, text

    def evaluate(self) -> tuple[Evaluation, Measures]:
        found = evaluate(self.model, self.images.test)
        return found, {"psnr_db": found.psnr_db, "perplexity": found.perplexity, "usage": found.usage}

    def more_state(self) -> dict[str, Tensor]:
        return {} if self._quantizer is None else {"window.code_counts": self._quantizer.code_counts}
