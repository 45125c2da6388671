"""Training of a contrastive model of images and captions."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastvq.data import Examples
from fastvq.data.augmentation import flip_randomly, shift_randomly
from fastvq.data.examples import to_device, to_float
from fastvq.data.order import batch_rows
from fastvq.errors import ConfigError
from fastvq.files import StrPath
from fastvq.models import ContrastiveModel, TextTokenizer
from fastvq.models.contrastive import retrieval

from .config import ContrastiveConfig
from .loop import Loop, Measures, delete_run, usable_device

CANDIDATES = 100
"""Largest number of held-out images and captions among which an evaluation looks for the right one."""


class ContrastiveTrainer(Loop[float]):
    """Training of one contrastive model in one folder; see `Loop`. The constructor sets torch's global random state.

    It learns from images as they are and as a VQ-VAE decodes them, in equal parts, so that it judges what is drawn and
    not how sharp it is. Images are shifted at random by a few pixels, and examples without a caption are left out.

    An evaluation is the share of held-out images whose caption is the nearest of `candidates`, at most `CANDIDATES`.

    Args:
        config: the settings.
        examples: images with captions.
        decoded: the training images as they are decoded, (N, C, H, W), uint8.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        tokenizer: the tokenizer of the captions.
        identity: fingerprint of the VQ-VAE, `fingerprint(model).hex()`.
        mirrored: learn from mirrored images as well.
        resume: continue from the latest checkpoint.
        replace: delete a training that is in the folder, after the settings have been validated.

    Raises:
        ConfigError: settings that are invalid for these examples or on this machine.
        CheckpointError: see `Loop.begin`.
    """

    config: ContrastiveConfig
    model: ContrastiveModel
    learns_from = "captions"

    def __init__(
        self,
        config: ContrastiveConfig,
        examples: Examples,
        decoded: Tensor,
        folder: StrPath,
        *,
        tokenizer: TextTokenizer,
        identity: str,
        mirrored: bool = False,
        resume: bool = False,
        replace: bool = False,
    ) -> None:
        train_captions, test_captions = examples.train_captions or (), examples.test_captions or ()
        self._kept = torch.tensor([row for row, text in enumerate(train_captions) if text.strip()])
        if config.batch_size > len(self._kept):
            raise ConfigError(
                f"batch_size must be at most {len(self._kept)}, the number of captioned images to learn from, got"
                f" {config.batch_size}"
            )
        self.device, self._mirrored = usable_device(config.device), mirrored
        self._splits = examples.train, decoded
        self._captions = tokenizer.rows(train_captions)
        held_out = [row for row, text in enumerate(test_captions) if text.strip()]
        chosen = held_out[:: max(1, -(-len(held_out) // CANDIDATES))]
        self.candidates = len(chosen)
        self._test = to_float(examples.test[chosen]), tokenizer.rows([test_captions[row] for row in chosen])[:, 0]
        torch.manual_seed(config.seed)
        settings = config.model_settings()
        try:
            model = ContrastiveModel(
                examples.train.shape[1], vocabulary=tokenizer.vocabulary, text_length=tokenizer.length, **settings
            ).to(self.device)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model.tokenizer = tokenizer
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay)
        digest = hashlib.sha256(repr((examples.fingerprint(), train_captions, test_captions)).encode()).hexdigest()
        built_from = {"settings": model.settings, "tokenizer": tokenizer.to_json(), "data": digest}
        super().__init__(config, model, optimizer, folder, identity=identity, built_from=built_from)
        if replace:
            delete_run(folder)
        self.begin(resume=resume)

    def learn(self) -> None:
        """Minimize the loss of one batch."""
        config = self.config
        rows = self._kept[batch_rows(self.step, count=len(self._kept), batch_size=config.batch_size, seed=config.seed)]
        coins = torch.rand(len(rows), 1, 1, 1) < 0.5
        originals, decoded = self._splits
        x = to_float(torch.where(coins, originals[rows], decoded[rows]))
        if config.shift:
            x = shift_randomly(x, self.step, most=config.shift, seed=config.seed, padding="replicate")
        if self._mirrored:
            x = flip_randomly(x, self.step, seed=config.seed)
        captions = self._captions[rows, torch.randint(self._captions.shape[1], (len(rows),))]
        loss = self.model.loss(to_device(x, self.device), to_device(captions, self.device))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._window += torch.stack([loss.detach(), torch.zeros_like(loss), torch.ones_like(loss)])

    def recent(self) -> tuple[Measures, str]:
        """Return the mean loss since the last record, and a text for the progress bar."""
        loss = float(self._window[0] / self._window[2])
        return {"loss": loss}, f"loss {loss:.3f}"

    def evaluate(self) -> tuple[float, Measures]:
        """Return the retrieval of held-out captions, and the same as a record."""
        self.model.eval()
        found = retrieval(self.model, *(part.to(self.device) for part in self._test))
        self.model.train()
        return found, {"retrieval": found}
