"""Evaluation of a run on images, with intervals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.errors import CheckpointError, ConfigError, DataError, MeasureError
from fastvq.modalities import image_measures as measures
from fastvq.modalities.image import MODALITY, PixelObjective
from fastvq.modalities.image_measures import image_measures, psnr
from fastvq.runs.evaluate import RESAMPLES, bootstrap_means, evaluate_run, rows_of, table
from fastvq.runs.load import load_prior, run_examples
from fastvq.runs.train_prior import train_prior
from fastvq.training.config import PriorConfig
from fastvq.training.evaluation import evaluate, reconstruct
from fastvq.training.prior import bits_per_index

from ..tiny_runs import tiny_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run, images = tiny_run(tmp_path_factory.mktemp("evaluated"), count=60, grayscale=False)
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1), progress=False)
    return run, images


def test_measures_are_those_of_the_images(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = tiny
    monkeypatch.setattr("fastvq.runs.evaluate._BATCH", 2)
    lines = evaluate_run(run)
    record = json.loads((run / "evaluation.json").read_text())
    prior, vqvae = load_prior(run)
    images = run_examples(run)
    expected = evaluate(vqvae, images.test, PixelObjective(1.0))
    measured = {name: values["value"] for name, values in record["measures"].items()}
    restored, indices = reconstruct(vqvae, images.test / 255)
    errors = (restored - images.test / 255).square().flatten(1).mean(1)
    bits = bits_per_index(prior, indices, None)
    assert record["examples"] == len(images.test) >= 2
    assert measured["psnr_db"] == pytest.approx(expected.psnr_db, abs=1e-4)
    assert measured["psnr_db_mean"] == pytest.approx(-10 * errors.log10().mean().item(), abs=1e-4)
    assert measured["perplexity"] == pytest.approx(float(fastvq.perplexity(expected.counts)))
    assert measured["usage"] == pytest.approx(len(indices.unique()) / 24)
    assert measured["bits_per_index"] == math.log2(24)
    assert measured["bits_per_dimension"] == pytest.approx(16 * math.log2(24) / (3 * 16 * 16))
    assert measured["prior_bits_per_index"] == pytest.approx(bits, rel=1e-6)
    assert measured["prior_bits_per_dimension"] == pytest.approx(16 * bits / (3 * 16 * 16), rel=1e-6)
    for name in ("psnr_db", "psnr_db_mean", "prior_bits_per_index"):
        values = record["measures"][name]
        assert values["low"] < values["value"] < values["high"]
    assert "low" not in record["measures"]["perplexity"]
    assert set(record["refused"]) >= {"ms_ssim", "lpips"}
    assert any(line.startswith("PSNR of the mean squared error (dB)") for line in lines)
    assert any(line.startswith("MS-SSIM: not measured, images of 16 x 16 are smaller than 176 x 176") for line in lines)


def test_an_evaluation_is_repeated_to_the_digit(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    run, images = tiny
    for name in ("a.json", "b.json"):
        evaluate_run(run, tmp_path / name, data=images)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_another_folder_is_measured_as_a_whole(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    run, images = tiny
    held_out = len(run_examples(run).test)
    moved = shutil.copytree(images, tmp_path / "moved")
    evaluate_run(run, tmp_path / "moved.json", data=moved)
    assert json.loads((tmp_path / "moved.json").read_text())["examples"] == held_out
    (moved / "00.png").unlink()
    evaluate_run(run, tmp_path / "other.json", data=moved)
    other = json.loads((tmp_path / "other.json").read_text())
    assert (other["examples"], other["data"]) == (59, "moved, all images")


def test_bad_input_is_named(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = tiny
    with pytest.raises(ConfigError, match=r"out must end in \.json, got .*x\.txt"):
        evaluate_run(run, tmp_path / "x.txt")
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate_run(tmp_path / "absent")
    with pytest.raises(
        DataError, match="data: fashion-mnist has images, 28x28 gray; the run learned from images, image_size 16"
    ):
        evaluate_run(run, tmp_path / "x.json", data="fashion-mnist")
    with pytest.raises(DataError, match="doesn't exist"):
        evaluate_run(run, tmp_path / "x.json", data=tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_the_bootstrap_has_the_spread_of_the_mean() -> None:
    values = torch.arange(200, dtype=torch.float64)
    means = bootstrap_means(values)
    error = values.std(correction=0).item() / math.sqrt(200)
    assert means.shape == (RESAMPLES,)
    assert means.mean().item() == pytest.approx(99.5, abs=4 * error / math.sqrt(RESAMPLES))
    assert means.std().item() == pytest.approx(error, rel=0.1)
    assert torch.equal(means, bootstrap_means(values))


def test_parts_of_the_bootstrap_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(30, dtype=torch.float64)
    whole = bootstrap_means(values)
    monkeypatch.setattr("fastvq.runs.evaluate._DRAWN", 30 * 7)
    assert torch.equal(bootstrap_means(values), whole)


def test_psnr_is_that_of_each_image() -> None:
    originals = torch.zeros(3, 1, 4, 4)
    restored = torch.tensor([0.1, 0.5, 0.0]).view(3, 1, 1, 1).expand_as(originals)
    assert psnr(restored, originals).tolist() == pytest.approx([20, 20 * math.log10(2), 120], abs=1e-4)


def ssim_of(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the SSIM of two images (H, W) from its definition, the window of each pixel reflected at the borders."""
    a, b = (torch.nn.functional.pad(i[None, None], (5, 5, 5, 5), mode="reflect")[0, 0] for i in (a, b))
    offsets = [n - 5 for n in range(11)]
    weights = [[math.exp(-(y * y + x * x) / (2 * 1.5**2)) for x in offsets] for y in offsets]
    window = torch.tensor(weights, dtype=torch.float64)
    window /= window.sum()
    similar = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (i[y : y + 11, x : x + 11].double() for i in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * p * p).sum() - mean_p**2, (window * q * q).sum() - mean_q**2
            cov = (window * p * q).sum() - mean_p * mean_q
            luminance = (2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2)
            similar.append(luminance * (2 * cov + 0.03**2) / (var_p + var_q + 0.03**2))
    return float(torch.stack(similar).mean())


def test_ssim_is_its_definition() -> None:
    pytest.importorskip("torchmetrics")
    originals = torch.rand(2, 1, 14, 16)
    restored = (originals + 0.2 * torch.randn(2, 1, 14, 16)).clamp(0, 1)
    found = image_measures((14, 16), 2, CPU).per_example["ssim"](restored, originals)
    expected = [ssim_of(*pair) for pair in zip(restored[:, 0], originals[:, 0], strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)


def test_ms_ssim_is_measured_where_five_scales_fit() -> None:
    pytest.importorskip("torchmetrics")
    images = torch.rand(1, 1, 176, 176)
    measure = image_measures((176, 176), 1, CPU).per_example["ms_ssim"]
    assert measure(images, images).tolist() == pytest.approx([1.0], abs=1e-5)
    assert "ms_ssim" in image_measures((175, 200), 1, CPU).refused


def test_small_images_and_few_are_refused() -> None:
    refused = image_measures((10, 40), 1, CPU).refused
    assert refused["ssim"] == "images of 10 x 40 are smaller than its window of 11 x 11"
    assert refused["lpips"].startswith("images of 10 x 40 are smaller than 31 x 31")
    assert refused["rfid"] == "a covariance needs two images"


def hide(*packages: str) -> Callable[[str], object]:
    """Return a `find_spec` that finds everything but these packages."""
    return lambda name: None if name in packages else object()


@pytest.mark.parametrize(("measure", "package"), [("lpips", "torchvision"), ("rfid", "torch-fidelity")])
def test_a_missing_package_is_the_reason(measure: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(measures.importlib.util, "find_spec", hide("torchvision", "torch_fidelity"))
    reason = image_measures((64, 64), 2, CPU).refused[measure]
    assert reason.startswith(f"{package}, which has the network")
    assert reason.endswith(f"pip install {package}")


def test_weights_are_only_downloaded_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MeasureError, match=r"net\.pth, are not here: --download fetches them from https://x"):
        measures._need_weights("https://x/net.pth", download=False)
    measures._need_weights("https://x/net.pth", download=True)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "net.pth").touch()
    measures._need_weights("https://x/net.pth", download=False)


def test_what_fails_is_the_reason() -> None:
    def build() -> None:
        raise OSError("no route to host")

    with pytest.raises(MeasureError, match="its weights cannot be had: no route to host"):
        measures._built(build)


def test_the_table_aligns_and_names_what_is_missing() -> None:
    record = {
        "confidence": 0.95,
        "measures": {"psnr_db": {"value": 21.5, "low": 21.0, "high": 22.0}, "usage": {"value": 0.25}},
        "refused": {"ssim": "there is none"},
    }
    assert rows_of(record, MODALITY)[0] == ("PSNR of the mean squared error (dB)", "21.50", "21.00 to 22.00")
    assert table(record, MODALITY)[-1] == "SSIM: not measured, there is none"
    assert table(record, MODALITY)[2] == "usage, share of codes chosen         0.2500"


def test_examples_without_a_value_are_left_out_and_counted(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tiny
    missing = [1]

    def some(restored: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
        values = torch.arange(len(originals), dtype=torch.float64)
        values[: missing[0]] = math.nan
        return values

    monkeypatch.setattr(measures, "psnr", some)
    lines = evaluate_run(run, tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    count = record["examples"]
    assert record["measures"]["psnr_db_mean"]["examples"] == count - 1
    assert record["measures"]["psnr_db_mean"]["value"] == pytest.approx(count / 2)
    assert any(line.startswith("PSNR") and f", of {count - 1} images" in line for line in lines)
    missing[0] = count
    evaluate_run(run, tmp_path / "b.json")
    record = json.loads((tmp_path / "b.json").read_text())
    assert "psnr_db_mean" not in record["measures"]
    assert record["refused"]["psnr_db_mean"] == f"it has a value for none of the {count} images"
