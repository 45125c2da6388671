"""Training of a VQ-VAE."""

from __future__ import annotations

import contextlib
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvq.codebook.health import Monitored
from fastvq.data import Examples
from fastvq.data.order import Batches, own_rows
from fastvq.data.registry import check_outside
from fastvq.errors import CodebookError, DataError
from fastvq.files import StrPath
from fastvq.modalities import TrainConfig, modality_of
from fastvq.modalities.pixel_config import PixelConfig
from fastvq.models import VQVAE, Decoder
from fastvq.parts import Annealed

from . import ranks
from .adversary import adversary_of
from .build import build_model
from .checkpoint import AVERAGED
from .evaluation import Evaluation, evaluate, usage_record
from .loop import Loop, Measures, usable_device
from .perceptual import PerceptualLoss


class Trainer(Loop[Evaluation]):
    """Training of one VQ-VAE in one folder; `Loop` describes runs and how they resume.

        loss = the objective of the modality + the bottleneck's loss

    For images the objective is mean((reconstruction - x)^2) / reconstruction_variance, see
    `fastvq.modalities.image.PixelObjective`; on request a `PerceptualLoss` and the loss of an `Adversary` are added.

    Data order and augmentation depend on seed and step alone. The constructor sets torch's global random state.

    Args:
        config: the settings.
        examples: the data set, as returned by `load_examples(config)`.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        resume: continue from the latest checkpoint in `folder`, with the same settings and data.

    Raises:
        DataError: there are fewer examples than a batch needs.
        CheckpointError: `resume` and there is no checkpoint, it is damaged, or the data differ; not `resume` and the
            folder already holds a run.
        ConfigError: `resume` and the settings differ from the checkpoint's; the device does not exist; the folder lies
            among the files of the data, which its pictures would become a part of.
    """

    config: TrainConfig
    model: VQVAE

    def __init__(self, config: TrainConfig, examples: Examples, folder: StrPath, *, resume: bool = False) -> None:
        self.modality = modality_of(config.modality)
        if config.batch_size > len(examples.train):
            raise DataError(
                f"batch_size must be at most {len(examples.train)}, the number of training {self.modality.noun[1]},"
                f" got {config.batch_size}"
            )
        check_outside(folder, config.data, "out")
        self.examples = examples
        self.device = usable_device(config.device)
        torch.manual_seed(config.seed)
        # In channels-last format the features reach the quantizer without a copy: a quarter of a CPU step's time.
        model = build_model(config).to(self.device)
        video = len(config.feature_grid) == 3
        model.to(memory_format=torch.channels_last_3d if video else torch.channels_last)  # type: ignore[call-overload]
        self._quantizer = model.bottleneck if isinstance(model.bottleneck, Monitored) else None
        self._annealed = [module for module in model.modules() if isinstance(module, Annealed)]
        self._adversary = adversary_of(config, self.device)
        self._perceptual: PerceptualLoss | None = None
        if isinstance(config, PixelConfig) and config.perceptual_weight:
            self._perceptual = PerceptualLoss(config, self.device)
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        super().__init__(config, model, optimizer, folder, identity=examples.fingerprint())
        self.objective = self.modality.objective(config).to(self.device)
        source = examples.train if examples.uncropped is None else examples.uncropped
        self._average: AveragedModel | None = None
        if config.weight_average:
            average = get_ema_multi_avg_fn(config.weight_average)
            self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._forward = ranks.synchronized(model)
        if config.compile:
            if self._adversary is not None:
                # It takes gradients before the backward pass, which must find the features that it needs.
                torch._functorch.config.donated_buffer = False
            self._forward = torch.compile(self._forward)
        self._batches = Batches(source, batch_size=config.batch_size, seed=config.seed, workers=config.workers or 0)
        own_rows(
            0, count=len(examples.train), batch_size=config.batch_size, seed=config.seed
        )  # the ranks divide a batch
        self.begin(resume=resume)

    def learn(self) -> None:
        """Minimize the reconstruction and bottleneck losses of one batch."""
        config = self.config
        for module in self._annealed:
            module.anneal_(self.step / config.steps)
        x = self._batch()
        self.optimizer.zero_grad()
        adversary = self._adversary
        if adversary is not None and self.step < adversary.start:
            adversary = None
        parts = x.chunk(config.accumulate)
        for n, part in enumerate(parts, 1):
            with ranks.unsynchronized(self._forward) if n < len(parts) else contextlib.nullcontext():
                with self._autocast():
                    output = self._forward(part, n < len(parts))
                restored = output.reconstruction.float()
                if len(restored) > len(part):  # separate autoencoders have a reconstruction each
                    part = torch.cat([part] * (len(restored) // len(part)))
                reconstruction_loss, error = self.objective.loss(restored, part)
                if self._perceptual is not None:
                    reconstruction_loss = reconstruction_loss + self._perceptual.loss(restored, part)
                loss = reconstruction_loss + output.loss.float()
                if adversary is not None:
                    last_weight = cast(Decoder, self.model.decoder).last_weight
                    loss = loss + adversary.loss(restored, reconstruction_loss, last_weight, part)
                (loss / len(parts) if len(parts) > 1 else loss).backward()
                if adversary is not None:
                    adversary.accumulate(part, restored, len(parts))
            sums = torch.stack([loss.detach(), error.detach(), torch.ones_like(loss)])
            self._window += sums / len(parts) if len(parts) > 1 else sums
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        if adversary is not None:
            adversary.learn(config.learning_rate_at(self.step))
        if self._average is not None:
            self._average.update_parameters(self.model)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def _batch(self) -> Tensor:
        """Return this rank's examples of the step, augmented, as floats."""
        stored = self._batches(self.step)
        return self.modality.augmented(stored, self.examples, self.config, self.step, self.device)

    @property
    def trained(self) -> VQVAE:
        """The model to evaluate: that of the averaged weights, if they are averaged."""
        return self.model if self._average is None else self._average.module  # type: ignore[return-value]

    def replicated(self) -> list[torch.nn.Module]:
        """Return the model and the discriminator."""
        return [self.model] + ([] if self._adversary is None else [self._adversary.discriminator])

    def more_state(self) -> dict[str, Tensor]:
        """Return the averaged weights, and the state of the adversary."""
        state = {} if self._adversary is None else self._adversary.state()
        average = {} if self._average is None else self._average.state_dict()
        return state | {f"{AVERAGED}.{name}": tensor for name, tensor in average.items()}

    def recent(self) -> tuple[Measures, str]:
        """Return loss, quality and codebook usage since the last record, and a text for the progress bar."""
        loss, error = (self._window[:2] / self._window[2]).tolist()
        name, value = self.objective.measure, self.objective.value(error)
        values: Measures = {"loss": loss, name: value}
        text = f"loss {loss:.3f}, {self.modality.measures[name].text(value)}"
        for loss_of_features in (self._perceptual, self._adversary):
            if loss_of_features is not None:
                values |= loss_of_features.recent()
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
        """Return the evaluation on the held-out examples, and its measures."""
        result = evaluate(self.trained, self.examples.test, self.objective, together=True)
        return result, {result.measure: result.value, **usage_record(result.stage_counts)}

    def counted(self) -> dict[str, Tensor]:
        """Return the counts of chosen codes and the sums of further losses since the last record."""
        losses = {"window.adversary": self._adversary, "window.perceptual": self._perceptual}
        windows = {name: loss.window for name, loss in losses.items() if loss is not None}
        if self._quantizer is None:
            return windows
        counts = [health.code_counts for health in self._quantizer.healths()]
        if len(counts) == 1:
            return windows | {"window.code_counts": counts[0]}
        return windows | {f"window.code_counts.{number}": values for number, values in enumerate(counts)}

    def _code_counts(self) -> list[Tensor]:
        """Return the counts (K,) of each codebook since the last record; none where levels are counted, not codes."""
        assert self._quantizer is not None
        tables = [health.code_counts for health in self._quantizer.healths()]
        counts = [row for table in tables for row in table.view(-1, table.shape[-1])]
        return counts if all(len(row) in self.model.adapter.stage_sizes() for row in counts) else []
