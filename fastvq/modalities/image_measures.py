"""Measures of reconstructed images beside their originals, each with the reason where it cannot be taken.

PSNR needs nothing; SSIM and MS-SSIM need torchmetrics; LPIPS and rFID need torchmetrics, the package with their network
and the network's weights, which are downloaded only on request. The protocol is in docs/evaluation.md.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.errors import MeasureError, MissingExtraError, first_line
from fastvq.extras import require

from .base import Distance, Measures, PerExample

SSIM_LEAST, MS_SSIM_LEAST, LPIPS_LEAST = 11, 176, 31
"""Least side of an image in pixels: the window of SSIM, what torchmetrics asks for five scales of such windows, and
what AlexNet's strides leave a pixel of."""
_FID_LEAST = 2


class FrechetDistance:
    """Fréchet distance between the Inception features of originals and reconstructions (rFID)."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def update(self, restored: Tensor, originals: Tensor) -> None:
        """Add images (B, C, H, W) in [0, 1] and their reconstructions."""
        for images, real in ((originals, True), (restored, False)):
            self._metric.update(_rgb(images), real=real)

    def result(self) -> float:
        """Return the distance."""
        return float(self._metric.compute())


def psnr(restored: Tensor, originals: Tensor) -> Tensor:
    """Return the PSNR in dB of each image, at most 120, which is that of an error below all rounding."""
    error = (restored - originals).square().flatten(1).mean(1, dtype=torch.float64)
    return -10 * error.clamp_min(1e-12).log10()


def image_measures(size: tuple[int, int], count: int, device: torch.device, *, download: bool = False) -> Measures:
    """Return the measures for `count` images of a size (height, width).

    Args:
        size, count: of the images.
        device: where the images are.
        download: download the weights of networks that are not here yet.
    """
    available: dict[str, PerExample] = {"psnr_db_mean": psnr}
    refused: dict[str, str] = {}
    makers: dict[str, Callable[[], PerExample]] = {
        "ssim": lambda: _ssim(size),
        "ms_ssim": lambda: _ms_ssim(size),
        "lpips": lambda: _lpips(size, device, download=download),
    }
    for name, make in makers.items():
        try:
            available[name] = make()
        except (MeasureError, MissingExtraError) as error:
            refused[name] = str(error)
    distances: dict[str, Distance] = {}
    try:
        distances["rfid"] = _rfid(count, device, download=download)
    except (MeasureError, MissingExtraError) as error:
        refused["rfid"] = str(error)
    return Measures(available, distances, refused)


def _ssim(size: tuple[int, int]) -> PerExample:
    if min(size) < SSIM_LEAST:
        raise MeasureError(f"images of {size[0]} x {size[1]} are smaller than its window of 11 x 11")
    image = _torchmetrics("functional.image")

    def ssim(restored: Tensor, originals: Tensor) -> Tensor:
        return image.structural_similarity_index_measure(restored, originals, data_range=1.0, reduction="none")

    return ssim


def _ms_ssim(size: tuple[int, int]) -> PerExample:
    if min(size) < MS_SSIM_LEAST:
        least = f"{MS_SSIM_LEAST} x {MS_SSIM_LEAST}"
        raise MeasureError(f"images of {size[0]} x {size[1]} are smaller than {least}, which its 5 scales need")
    image = _torchmetrics("functional.image")

    def ms_ssim(restored: Tensor, originals: Tensor) -> Tensor:
        return image.multiscale_structural_similarity_index_measure(
            restored, originals, data_range=1.0, reduction="none", normalize="relu"
        )

    return ms_ssim


def lpips_network(size: tuple[int, int], device: torch.device, *, download: bool = False) -> nn.Module:
    """Return LPIPS with AlexNet for images of a size: a call with two batches (B, 3, H, W) returns (B, 1, 1, 1).

    Raises:
        MeasureError: the images are too small, torchvision is missing, or weights are not here.
        MissingExtraError: torchmetrics is not installed.
    """
    if min(size) < LPIPS_LEAST:
        least = f"{LPIPS_LEAST} x {LPIPS_LEAST}"
        raise MeasureError(f"images of {size[0]} x {size[1]} are smaller than {least}, which AlexNet needs")
    image = _torchmetrics("image")
    _need("torchvision", "AlexNet")
    torchvision = importlib.import_module("torchvision.models")
    _need_weights(torchvision.AlexNet_Weights.DEFAULT.url, download=download)
    network: nn.Module = _built(lambda: image.LearnedPerceptualImagePatchSimilarity(net_type="alex").net)
    return network.to(device)


def _lpips(size: tuple[int, int], device: torch.device, *, download: bool) -> PerExample:
    network = lpips_network(size, device, download=download)

    def distance(restored: Tensor, originals: Tensor) -> Tensor:
        with torch.no_grad():
            return network(_rgb(restored), _rgb(originals), normalize=True).flatten()

    return distance


def _rfid(count: int, device: torch.device, *, download: bool) -> FrechetDistance:
    if count < _FID_LEAST:
        raise MeasureError("a covariance needs two images")
    image = _torchmetrics("image")
    _need("torch_fidelity", "Inception")
    source = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    _need_weights(source.URL_INCEPTION_V3, download=download)
    return FrechetDistance(_built(lambda: image.FrechetInceptionDistance(feature=2048, normalize=True)).to(device))


def _torchmetrics(module: str) -> Any:
    """Import and return a module of torchmetrics, which imports torchvision where that is installed."""
    try:
        return require(f"torchmetrics.{module}", "evaluate")
    except MissingExtraError:
        raise
    except Exception as error:  # such as a torchvision for another version of torch
        raise MeasureError(f"torchmetrics cannot be imported: {first_line(error)}") from error


def _need(package: str, network: str) -> None:
    """Raise unless a package that has a network can be imported."""
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise MeasureError(f"{name}, which has the network {network}, is missing: pip install {name}")
    try:
        importlib.import_module(package)
    except Exception as error:  # such as a build for another version of torch
        raise MeasureError(f"{package} cannot be imported: {first_line(error)}") from error


def _need_weights(url: str, *, download: bool) -> None:
    """Raise unless the weights at a URL have been downloaded, or may be."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not download and not file.is_file():
        raise MeasureError(f"its weights, {file}, are not here: --download fetches them from {url}")


def _built(build: Callable[[], Any]) -> Any:
    """Return a network with its weights; what fails is the reason."""
    try:
        with torch.random.fork_rng(devices=[]):
            return build().eval()
    except Exception as error:  # of the network, of the file, of the package
        raise MeasureError(f"its weights cannot be had: {first_line(error)}") from error


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
