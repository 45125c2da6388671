"""Training of a VQ-VAE."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from fastvq.codebook.health import Monitored
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.data.registry import check_outside
from fastvq.errors import CodebookError, DataError
from fastvq.files import StrPath
from fastvq.models import VQVAE, Decoder

from .adversary import Adversary
from .build import build_model
from .config import TrainConfig
from .data_order import Batches, crop_randomly, flip_randomly, to_device
from .evaluation import Evaluation, evaluate, psnr_db, usage_record
from .loop import Loop, Measures, usable_device


class Trainer(Loop[Evaluation]):
    """Training of one VQ-VAE in one folder; `Loop` describes runs and how they resume.

        loss = mean((reconstruction - x)^2) / reconstruction_variance + the bottleneck's loss

    On request the error is mean|reconstruction - x| / sqrt(reconstruction_variance), and the loss of an `Adversary` is
    added.

    Data order and flips depend on seed and step alone. The constructor sets torch's global random state.

    Args:
        config: the settings.
        images: the data set, as returned by `load_images(config)`.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        resume: continue from the latest checkpoint in `folder`, with the same settings and data.

    Raises:
        DataError: there are fewer images than a batch needs.
        CheckpointError: `resume` and there is no checkpoint, it is damaged, or the data differ; not `resume` and the
            folder already holds a run.
        ConfigError: `resume` and the settings differ from the checkpoint's; the device does not exist; the folder lies
            among the images, which its pictures would become a part of.
    """

    config: TrainConfig
    model: VQVAE

    def __init__(self, config: TrainConfig, images: Images, folder: StrPath, *, resume: bool = False) -> None:
        if config.batch_size > len(images.train):
            raise DataError(
                f"batch_size must be at most {len(images.train)}, the number of training images,"
                f" got {config.batch_size}"
            )
        check_outside(folder, config.data, "out")
        self.images = images
        self.device = usable_device(config.device)
        torch.manual_seed(config.seed)
        # In channels-last format the features reach the quantizer without a copy: a quarter of a CPU step's time.
        model = build_model(config).to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._quantizer = model.bottleneck if isinstance(model.bottleneck, Monitored) else None
        self._adversary = Adversary(config, self.device) if config.adversarial_weight else None
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        super().__init__(config, model, optimizer, folder, identity=images.fingerprint())
        source = images.train if images.uncropped is None else images.uncropped
        self._batches = Batches(source, batch_size=config.batch_size, seed=config.seed, workers=config.workers or 0)
        self.begin(resume=resume)

    def learn(self) -> None:
        """Minimize the reconstruction and bottleneck losses of one batch."""
        config = self.config
        pixels = self._batches(self.step)
        if self.images.uncropped is not None:
            height, width = self.images.train.shape[-2:]
            pixels = crop_randomly(pixels, self.step, height=height, width=width, seed=config.seed)
        x = to_float(to_device(pixels, self.device))
        if config.flip:
            x = flip_randomly(x, self.step, seed=config.seed)
        output = self.model(x)
        difference = output.reconstruction - x
        squared_error = difference.square().mean()
        if config.reconstruction_loss == "l1":
            error = difference.abs().mean() / math.sqrt(config.reconstruction_variance)
        else:
            error = squared_error / config.reconstruction_variance
        loss = error + output.loss
        adversary = self._adversary if self.step >= config.adversarial_start else None
        if adversary is not None:
            loss = loss + adversary.loss(output.reconstruction, error, cast(Decoder, self.model.decoder).last_weight)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if adversary is not None:
            adversary.learn(x, output.reconstruction, config.learning_rate_at(self.step))
        self._window += torch.stack([loss.detach(), squared_error.detach(), torch.ones_like(loss)])

    def recent(self) -> tuple[Measures, str]:
        """Return loss, PSNR and codebook usage since the last record, and a text for the progress bar."""
        loss, squared_error = (self._window[:2] / self._window[2]).tolist()
        values: Measures = {"loss": loss, "psnr_db": psnr_db(squared_error)}
        text = f"loss {loss:.3f}, PSNR {psnr_db(squared_error):.2f} dB"
        if self._adversary is not None:
            values |= self._adversary.recent()
        if self._quantizer is not None:
            used = usage_record(self._code_counts())
            lost = float(self._quantizer.health(together=False).non_finite.max())
            if lost == 1:
                raise CodebookError(f"no code of the codebook is finite at step {self.step}: try a lower learning_rate")
            self._quantizer.reset_health()
            if used["perplexity"] is not None:
                text += f", perplexity {used['perplexity']:.0f}"
            text += f", {lost:.0%} of the codes not finite" if lost else ""
            values |= used
        return values, text

    def evaluate(self) -> tuple[Evaluation, Measures]:
        """Return the evaluation on the held-out images, and its measures."""
        result = evaluate(self.model, self.images.test)
        return result, {"psnr_db": result.psnr_db, **usage_record(result.stage_counts)}

    def more_state(self) -> dict[str, Tensor]:
        """Return the counts of chosen codes since the last record, and the state of the adversary."""
        state = {} if self._adversary is None else self._adversary.state()
        if self._quantizer is None:
            return state
        counts = [health.code_counts for health in self._quantizer.healths()]
        if len(counts) == 1:
            return state | {"window.code_counts": counts[0]}
        return state | {f"window.code_counts.{number}": values for number, values in enumerate(counts)}

    def _code_counts(self) -> list[Tensor]:
        """Return the counts (K,) of each codebook since the last record; none where levels are counted, not codes."""
        assert self._quantizer is not None
        tables = [health.code_counts for health in self._quantizer.healths()]
        counts = [row for table in tables for row in table.view(-1, table.shape[-1])]
        return counts if all(len(row) in self.model.adapter.stage_sizes() for row in counts) else []
