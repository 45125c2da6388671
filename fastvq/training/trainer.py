"""Training of a VQ-VAE."""

from __future__ import annotations

import contextlib
import math
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvq.codebook.health import Monitored
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.data.registry import check_outside
from fastvq.errors import CodebookError, ConfigError, DataError
from fastvq.files import StrPath
from fastvq.models import VQVAE, Decoder

from . import ranks
from .adversary import Adversary
from .build import build_model
from .checkpoint import AVERAGED
from .config import TrainConfig
from .data_order import Batches, crop_randomly, flip_randomly, own_rows, to_device
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
        if config.adversarial_weight and not ranks.alone():
            raise ConfigError("adversarial_weight must be 0 on several ranks: a discriminator learns in one process")
        self._adversary = Adversary(config, self.device) if config.adversarial_weight else None
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        super().__init__(config, model, optimizer, folder, identity=images.fingerprint())
        source = images.train if images.uncropped is None else images.uncropped
        self._average: AveragedModel | None = None
        if config.weight_average:
            average = get_ema_multi_avg_fn(config.weight_average)
            self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._forward = ranks.synchronized(model)
        if config.compile:
            self._forward = torch.compile(self._forward)
        self._batches = Batches(source, batch_size=config.batch_size, seed=config.seed, workers=config.workers or 0)
        own_rows(0, count=len(images.train), batch_size=config.batch_size, seed=config.seed)  # the ranks divide a batch
        self.begin(resume=resume)

    def learn(self) -> None:
        """Minimize the reconstruction and bottleneck losses of one batch."""
        config = self.config
        x = self._batch()
        self.optimizer.zero_grad()
        adversary = self._adversary if self.step >= config.adversarial_start else None
        parts = x.chunk(config.accumulate)
        for n, part in enumerate(parts, 1):
            with ranks.unsynchronized(self._forward) if n < len(parts) else contextlib.nullcontext():
                with self._autocast():
                    output = self._forward(part, n < len(parts))
                restored = output.reconstruction.float()
                error, squared_error = self._errors(restored, part)
                loss = error + output.loss.float()
                if adversary is not None:
                    loss = loss + adversary.loss(restored, error, cast(Decoder, self.model.decoder).last_weight)
                (loss / len(parts) if len(parts) > 1 else loss).backward()
            sums = torch.stack([loss.detach(), squared_error.detach(), torch.ones_like(loss)])
            self._window += sums / len(parts) if len(parts) > 1 else sums
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        if adversary is not None:
            adversary.learn(x, restored, config.learning_rate_at(self.step))
        if self._average is not None:
            self._average.update_parameters(self.model)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def _errors(self, restored: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction loss and the mean squared error."""
        difference, variance = restored - x, self.config.reconstruction_variance
        squared_error = difference.square().mean()
        if self.config.reconstruction_loss == "l1":
            return difference.abs().mean() / math.sqrt(variance), squared_error
        return squared_error / variance, squared_error

    def _batch(self) -> Tensor:
        """Return this rank's images of the step, augmented, as floats."""
        config = self.config
        pixels = self._batches(self.step)
        if self.images.uncropped is not None:
            height, width = self.images.train.shape[-2:]
            pixels = crop_randomly(pixels, self.step, height=height, width=width, seed=config.seed)
        x = to_float(to_device(pixels, self.device))
        return flip_randomly(x, self.step, seed=config.seed) if config.flip else x

    @property
    def trained(self) -> VQVAE:
        """The model to evaluate: that of the averaged weights, if they are averaged."""
        return self.model if self._average is None else self._average.module  # type: ignore[return-value]

    def more_state(self) -> dict[str, Tensor]:
        """Return the averaged weights, and the state of the adversary."""
        state = {} if self._adversary is None else self._adversary.state()
        average = {} if self._average is None else self._average.state_dict()
        return state | {f"{AVERAGED}.{name}": tensor for name, tensor in average.items()}

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
        result = evaluate(self.trained, self.images.test, together=True)
        return result, {"psnr_db": result.psnr_db, **usage_record(result.stage_counts)}

    def counted(self) -> dict[str, Tensor]:
        """Return the counts of chosen codes since the last record."""
        if self._quantizer is None:
            return {}
        counts = [health.code_counts for health in self._quantizer.healths()]
        if len(counts) == 1:
            return {"window.code_counts": counts[0]}
        return {f"window.code_counts.{number}": values for number, values in enumerate(counts)}

    def _code_counts(self) -> list[Tensor]:
        """Return the counts (K,) of each codebook since the last record; none where levels are counted, not codes."""
        assert self._quantizer is not None
        tables = [health.code_counts for health in self._quantizer.healths()]
        counts = [row for table in tables for row in table.view(-1, table.shape[-1])]
        return counts if all(len(row) in self.model.adapter.stage_sizes() for row in counts) else []
