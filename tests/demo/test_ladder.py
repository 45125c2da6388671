"""The demo of the models that lead to the VQ-VAE."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastvq.demo import ladder
from fastvq.demo.folder import _delete
from fastvq.modalities import ImageConfig
from fastvq.training.checkpoint import checkpoint_folders

from ..training.tiny import tiny_images

SMALL = ImageConfig(
    codebook_size=16, dim=8, width=8, residual_width=4, encoder_blocks=1, decoder_blocks=1, steps=2, batch_size=8
)  # fmt: skip


def test_the_subspace_is_found_the_better_the_more_data() -> None:
    angles = list(ladder.subspace_angles(seed=0, counts=(30, 1000, 30_000)).values())
    assert angles[0] > 2 * angles[1] > 4 * angles[2]
    assert angles[2] < 1


def test_principal_components_are_those_of_the_singular_values() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(
        torch.arange(1.0, 7.0, dtype=torch.float64)
    )
    directions, mean = ladder.principal_components(x, 2)
    expected = torch.linalg.svd(x - mean, full_matrices=False).Vh[:2]
    torch.testing.assert_close((expected @ directions).abs(), torch.eye(2, dtype=torch.float64))


def test_the_demo_fills_a_table_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    labels = {"train_labels": torch.arange(40) % 3, "test_labels": torch.arange(20) % 3, "class_names": ("a", "b", "c")}
    examples = dataclasses.replace(tiny_images(), **labels)
    monkeypatch.setattr(ladder, "load_examples", lambda _: examples)
    monkeypatch.setattr(ladder, "train_prior", lambda *_, **__: SimpleNamespace(bits_per_index=3.0))
    folder = tmp_path / "demo"
    metrics = ladder.run_demo(folder, config=SMALL)
    assert metrics is not None
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    rows = {row["model"]: row for row in metrics["table"]}
    assert list(rows) == ["pca", "autoencoder", "vae", "vq-vae", "vq-vae, learned prior", "gumbel"]
    uniform = 49 * math.log2(16)
    assert [rows[name]["latent_bits"] for name in ("pca", "autoencoder", "vq-vae", "gumbel")] == [uniform] * 4
    saved = rows["vq-vae"]["elbo_bits"] - rows["vq-vae, learned prior"]["elbo_bits"]
    assert saved == pytest.approx(49 / 28**2)
    assert len(metrics["vae_bits_per_dimension_of_latent"]) == 8
    page = (folder / "index.html").read_text()
    for name in ("subspace", "latents", "divergence", "interpolations"):
        assert f'src="{name}.png"' in page
    assert "Gumbel dVAE" in page
    assert all(checkpoint_folders(folder / name) for name in ("autoencoder", "vae", "gumbel"))
    _delete(folder)
    assert {path.name for path in folder.rglob("*") if path.is_file()} <= {".demo", ".lock"}
