"""Demo of the models that lead to the VQ-VAE, on the same images, in five parts.

PCA, an autoencoder, a variational autoencoder, a VQ-VAE and a Gumbel-softmax discrete VAE; all but PCA have the same
encoder and decoder. The VQ-VAE is a run in the folder itself, the others are runs in subfolders.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastvq
from fastvq.data import Examples
from fastvq.data.examples import describe, to_float
from fastvq.data.order import batch_rows
from fastvq.extras import tracked
from fastvq.files import StrPath, write_whole
from fastvq.modalities import ImageConfig
from fastvq.modalities.image import psnr_db
from fastvq.models import (
    VQVAE,
    Continuous,
    Decoder,
    Encoder,
    GaussianBottleneck,
    NoBottleneck,
    discretized_logistic,
    elbo_bits_per_dimension,
)
from fastvq.runs import figures, plots
from fastvq.runs.page import Part, Picture, Section, TextTable, write_page
from fastvq.runs.train_prior import train_prior
from fastvq.training.build import load_examples
from fastvq.training.checkpoint import checkpoint_folders
from fastvq.training.config import PriorConfig
from fastvq.training.trainer import Trainer

from .folder import METRICS, check_request, demo_folder
from .parts import announce, with_steps

DEMO = ImageConfig(steps=1000, clip_norm=0.0)
DEMO_PRIOR = PriorConfig(steps=600)
PLANE_STEPS = 600
RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoencoder": ("none", {"latent_dim": 1}),
    "vae": ("vae", {"latent_dim": 8, "kl_weight": 0.008}),
    "vq-vae": ("vq", {}),
    "gumbel": ("gumbel", {"kl_weight": 1e-4}),
}
"""Bottleneck and options of each model."""
_NAMES = {
    "pca": "PCA",
    "autoencoder": "autoencoder",
    "vae": "VAE",
    "vq-vae": "VQ-VAE",
    "gumbel": "Gumbel dVAE",
}
_PARTS = [
    ("PCA of linear data, whose subspace is known", 2),
    ("training four models with the same encoder and decoder", 280),
    ("training an autoencoder and a VAE with two latents", 30),
    ("training a prior over the indices of the VQ-VAE", 75),
    ("one table, interpolations", 15),
]
"""Description of each part, and its approximate time in seconds on 2 idle cores."""
_LATENTS, _NOISE = 3, 0.5
_DIMENSIONS = 20
_FITTED = 1000
"""Training images that ranges and scales are fitted to."""


class Coded(NamedTuple):
    """Held-out images as a model restores them, and the cost of their latents.

    Attributes:
        fitted: reconstructions of the training images that the scale of the likelihood is fitted to.
        restored: reconstructions of the held-out images.
        bits: (N,), of the latents of each held-out image.
    """

    fitted: Tensor
    restored: Tensor
    bits: Tensor


def run_demo(
    folder: StrPath,
    *,
    config: ImageConfig | None = None,
    steps: int | None = None,
    prior_config: PriorConfig | None = None,
    prior_steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, measure and draw; return the content of metrics.json, or None if interrupted.

    Args:
        folder: gets `index.html`, the pictures, `metrics.json`, the run of the VQ-VAE with its prior, and the runs of
            the other models in subfolders.
        config: settings of the VQ-VAE, by default `DEMO`; the other models differ in the bottleneck.
        steps: training steps of each model, instead of those in `config`.
        prior_config: settings of the prior, by default `DEMO_PRIOR`.
        prior_steps: training steps of the prior, instead of those in `prior_config`.
        resume: continue an interrupted demo. The models with two latents are trained again, in under a minute.
        overwrite: replace the demo that is in the folder, see `demo_folder`.

    Raises:
        CheckpointError: see `demo_folder`; or `resume` and there is nothing to continue.
        ConfigError: `resume` and the settings differ from those of the demo, other than by more steps.
    """
    folder, config = Path(folder), with_steps(config or DEMO, steps)
    prior_config = with_steps(prior_config or DEMO_PRIOR, prior_steps)
    check_request(resume=resume, overwrite=overwrite)
    examples = load_examples(config)
    with demo_folder(folder, resume=resume, overwrite=overwrite):
        return _run(folder, examples, config, prior_config, resume=resume)


def _run(
    folder: Path, examples: Examples, config: ImageConfig, prior_config: PriorConfig, *, resume: bool
) -> dict[str, Any] | None:
    started = time.monotonic()
    print(describe(examples), flush=True)
    announce(_PARTS, 1)
    angles = subspace_angles(seed=config.seed)
    _draw_angles(folder / "subspace.png", angles)

    announce(_PARTS, 2)
    models: dict[str, VQVAE] = {}
    for name in ("vq-vae", "autoencoder", "vae", "gumbel"):
        kind, options = RUNGS[name]
        own = dataclasses.replace(config, bottleneck=kind, bottleneck_options=options)
        if name == "vae":
            own = dataclasses.replace(own, codebook_size=ImageConfig.codebook_size)
        target = folder if name == "vq-vae" else folder / name
        print(_NAMES[name], flush=True)
        continues = resume and (name == "vq-vae" or bool(checkpoint_folders(target)))
        trainer = Trainer(own, examples, target, resume=continues)
        if trainer.fit() is None:
            return None
        models[name] = trainer.model.eval()

    announce(_PARTS, 3)
    planes = {
        name: _train_plane(name, config, examples, min(config.steps, PLANE_STEPS)) for name in ("autoencoder", "vae")
    }
    _draw_planes(folder / "latents.png", planes, examples)

    announce(_PARTS, 4)
    trained = train_prior(folder, prior_config, resume=resume)
    if trained is None:
        return None

    announce(_PARTS, 5)
    vae = models["vae"]
    divergence = _divergences(vae, to_float(examples.test))
    _draw_divergences(folder / "divergence.png", divergence)
    _draw_interpolations(folder / "interpolations.png", models, examples)
    table = _table(models, examples, config)
    positions = math.prod(config.feature_grid)
    learned = trained.bits_per_index * positions
    row = next(row for row in table if row["model"] == "vq-vae")
    table.insert(
        table.index(row) + 1,
        row
        | {
            "model": "vq-vae, learned prior",
            "latent_bits": learned,
            "elbo_bits": row["elbo_bits"] + (learned - row["latent_bits"]) / examples.test[0].numel(),
        },
    )
    metrics: dict[str, Any] = {
        "data": examples.name,
        "train_images": len(examples.train),
        "test_images": len(examples.test),
        "positions": positions,
        "codebook_size": config.codebook_size,
        "subspace_degrees": {str(count): angle for count, angle in angles.items()},
        "plane_spread": {name: _spread(latents) for name, (_, latents) in planes.items()},
        "vae_bits_per_dimension_of_latent": [value / math.log(2) for value in divergence.tolist()],
        "table": table,
        "log10_of_decodable_images": positions * math.log10(config.codebook_size),
        "log10_of_decodable_images_32x32x512": 32 * 32 * math.log10(512),
        "steps": config.steps,
        "prior_steps": prior_config.steps,
        "total_seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
        "versions": {"fastvq": fastvq.__version__, "torch": torch.__version__},
    }
    write_whole(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    page = write_ladder_page(folder, metrics)
    for one in _rows(metrics):
        print("  ".join(f"{cell:>22}" for cell in one))
    print(f"all pictures and tables: {page}")
    return metrics


def subspace_angles(*, seed: int, counts: tuple[int, ...] = (30, 100, 300, 1000, 3000, 10000)) -> dict[int, float]:
    """Return the largest principal angle in degrees between the subspace of linear data and that of PCA.

        x = A z + v,   z ~ N(0, 1) (3 coordinates),   v ~ N(0, 0.5^2) (20 coordinates)

    Args:
        seed: of A, z and v.
        counts: numbers of data, each with an angle in the result.

    Source: Tipping, Bishop, Probabilistic Principal Component Analysis, 1999, for the model.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(_DIMENSIONS, _LATENTS, generator=generator, dtype=torch.float64)
    true = torch.linalg.qr(mixing).Q
    angles = {}
    for count in counts:
        z = torch.randn(count, _LATENTS, generator=generator, dtype=torch.float64)
        v = torch.randn(count, _DIMENSIONS, generator=generator, dtype=torch.float64)
        found, _ = principal_components(z @ mixing.mT + _NOISE * v, _LATENTS)
        smallest_cosine = torch.linalg.svdvals(true.mT @ found).min().clamp(max=1)
        angles[count] = math.degrees(math.acos(float(smallest_cosine)))
    return angles


def principal_components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the orthonormal directions (D, count) of largest variance of rows x (N, D), and their mean (D,)."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))
    return vectors.flip(1)[:, :count], mean


class _PlaneEncoder(nn.Module):
    """The encoder, and a linear map of its whole grid to one vector: (B, C, H, W) to (B, D, 1, 1)."""

    def __init__(self, encoder: nn.Module, features: int, latents: int) -> None:
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(features, latents)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.encoder(x).flatten(1))[:, :, None, None]


class _PlaneDecoder(nn.Module):
    """A linear map of one vector to a grid, and the decoder."""

    def __init__(self, decoder: nn.Module, latents: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder, self.linear, self.shape = decoder, nn.Linear(latents, math.prod(shape)), shape

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(self.linear(codes.flatten(1)).unflatten(1, self.shape))


def _train_plane(name: str, config: ImageConfig, examples: Examples, steps: int) -> tuple[VQVAE, Tensor]:
    """Return an autoencoder or a VAE with two latents an image, and the latents (N, 2) of the held-out images."""
    torch.manual_seed(config.seed)
    network, shape, width = config.network(), (config.dim, *config.feature_grid), 4
    encoder = Encoder(1, config.dim, residual_blocks=config.encoder_blocks, downsamples=config.downsamples, **network)
    decoder = Decoder(config.dim, 1, residual_blocks=config.decoder_blocks, upsamples=config.downsamples, **network)
    # In nats per image: 2 sigma^2 / (values variance) as weight, with sigma^2 the error that two latents leave.
    weight = 2 * 0.025 / (examples.test[0].numel() * config.reconstruction_variance)
    latent = NoBottleneck(width, latent_dim=2) if name == "autoencoder" else None
    bottleneck: Continuous = latent or GaussianBottleneck(width, latent_dim=2, kl_weight=weight)
    model = VQVAE(_PlaneEncoder(encoder, math.prod(shape), width), bottleneck, _PlaneDecoder(decoder, width, shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in tracked(range(steps), steps, "step"):
        rows = batch_rows(step, count=len(examples.train), batch_size=config.batch_size, seed=config.seed)
        x = to_float(examples.train[rows])
        output = model(x)
        loss = (output.reconstruction - x).square().mean() / config.reconstruction_variance + output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.encoder(part).flatten(1) for part in to_float(examples.test).split(250)])
        return model, bottleneck.latents(features)


def _spread(latents: Tensor) -> dict[str, float]:
    """Return the standard deviation of the latents, and the norm of the farthest one in units of it."""
    deviation = latents.std(0).square().mean().sqrt()
    farthest = (latents - latents.mean(0)).norm(dim=1).max() / deviation
    return {"deviation": float(deviation), "farthest": float(farthest)}


@torch.no_grad()
def _divergences(model: VQVAE, x: Tensor) -> Tensor:
    """Return the KL of each latent dimension in nats per position, averaged over images, largest first."""
    assert isinstance(model.bottleneck, GaussianBottleneck)
    parts = [model.bottleneck.divergences(model.encoder(part).flatten(2).mT).mean((0, 1)) for part in x.split(250)]
    return torch.stack(parts).mean(0).sort(descending=True).values


@torch.no_grad()
def _coded(name: str, model: VQVAE, examples: Examples, config: ImageConfig) -> Coded:
    fitted, test = to_float(examples.train[:_FITTED]), to_float(examples.test)
    uniform = math.prod(config.feature_grid) * math.log2(config.codebook_size)
    bits = torch.full((len(test),), uniform)
    bottleneck = model.bottleneck
    if isinstance(bottleneck, NoBottleneck):
        # Each latent is rounded to as many levels as the codebook has codes, between the extremes of training images.
        low, high = bottleneck.latents(_features(model, fitted)).aminmax()

        def restore(x: Tensor) -> Tensor:
            latents = bottleneck.latents(_features(model, x))
            rounded = _rounded(latents, low, high, config.codebook_size)
            return _decode(model, bottleneck.features(rounded), config)

    elif isinstance(bottleneck, GaussianBottleneck):
        torch.manual_seed(config.seed)
        divergence = bottleneck.divergences(_features(model, test)).flatten(1).sum(1)
        bits = divergence / math.log(2)

        def restore(x: Tensor) -> Tensor:
            # A sample of the posterior: the bound is an expectation over it.
            mean, log_variance = bottleneck.moments(_features(model, x))
            z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
            return _decode(model, bottleneck.project_out(z), config)

    else:
        restore = model.reconstruct
    parts = [torch.cat([restore(part) for part in x.split(250)]).clamp(0, 1) for x in (fitted, test)]
    return Coded(parts[0], parts[1], bits)


def _features(model: VQVAE, x: Tensor) -> Tensor:
    """Return the features (B, N, D) of images."""
    return torch.cat([model.encoder(part).flatten(2).mT for part in x.split(250)])


def _decode(model: VQVAE, features: Tensor, config: ImageConfig) -> Tensor:
    return model.decoder(features.mT.unflatten(2, config.feature_grid))


def _rounded(x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Return x at the nearest of evenly spaced levels from `low` to `high`."""
    step = (high - low) / (levels - 1)
    return low + ((x - low) / step).round().clamp(0, levels - 1) * step


def _coded_by_pca(examples: Examples, config: ImageConfig) -> Coded:
    """Return images from as many principal components as the grid has positions, each of the bits of an index."""
    train, test = (to_float(split).flatten(1) for split in (examples.train, examples.test))
    count = min(math.prod(config.feature_grid), train.shape[1])
    directions, mean = principal_components(train, count)
    scores = (train - mean) @ directions
    low, high = scores.amin(0), scores.amax(0)
    restored = []
    for x in (train[:_FITTED], test):
        rounded = _rounded((x - mean) @ directions, low, high, config.codebook_size)
        restored.append((rounded @ directions.mT + mean).clamp(0, 1).view(-1, *examples.test.shape[1:]))
    bits = torch.full((len(test),), count * math.log2(config.codebook_size))
    return Coded(restored[0], restored[1], bits)


def _table(models: dict[str, VQVAE], examples: Examples, config: ImageConfig) -> list[dict[str, Any]]:
    """Return PSNR, bits of the latents and the negative evidence lower bound in bits per dimension of each model."""
    fitted, test = to_float(examples.train[:_FITTED]), to_float(examples.test)
    rows = []
    for name in _NAMES:
        coded = _coded_by_pca(examples, config) if name == "pca" else _coded(name, models[name], examples, config)
        # One scale for all values, the most likely one on training images.
        scales = torch.linspace(-6, -1, 101)
        likely = [float(discretized_logistic(fitted[:200], coded.fitted[:200], float(s)).mean()) for s in scales]
        scale = float(scales[min(range(len(likely)), key=likely.__getitem__)])
        nats = discretized_logistic(test, coded.restored, scale)
        bound = elbo_bits_per_dimension(nats, coded.bits * math.log(2))
        rows.append(
            {
                "model": name,
                "latent_bits": float(coded.bits.mean()),
                "psnr_db": psnr_db(float((coded.restored - test).square().mean())),
                "log_scale": scale,
                "elbo_bits": float(bound.mean()),
            }
        )
    return rows


def _draw_angles(path: Path, angles: dict[int, float]) -> None:
    figure, axes = figures.figure_with(6.5, 3.2, "", "")
    axes.loglog(list(angles), list(angles.values()), marker="o", color=figures.SERIES[0])
    axes.set_xlabel("number of data")
    axes.set_ylabel("largest principal angle (degrees)")
    axes.grid(alpha=0.3, which="both")
    caption = (
        f"Data x = A z + v of {_DIMENSIONS} dimensions, {_LATENTS} of which carry the signal. The angle between the"
        " subspace of A and that of the principal components falls with the square root of the number of data."
    )
    figures.save_figure(figure, path, caption, "PCA recovers the subspace of linear data")


def _draw_planes(path: Path, planes: dict[str, tuple[VQVAE, Tensor]], examples: Examples) -> None:
    figure, panels = figures.figure_with(9.5, 4.6, "", "", columns=len(planes))
    labels = examples.test_labels
    classes = examples.class_names or ()
    for axes, (name, (_, latents)) in zip(panels, planes.items(), strict=True):
        color = "gray" if labels is None else labels.tolist()
        drawn = axes.scatter(*latents.mT.tolist(), c=color, s=7, cmap="tab10", alpha=0.8, linewidths=0)
        axes.set_title(_NAMES[name], fontsize=10)
        axes.set_aspect("equal", "datalim")
    if labels is not None and len(classes) <= 10:
        handles, _ = drawn.legend_elements(num=list(range(len(classes))))
        figure.legend(handles, classes, loc="outside right center", fontsize=8, frameon=False)
    caption = (
        "Two latents for each held-out image, colored by class. The KL term keeps those of the VAE near the standard"
        " normal distribution; nothing limits those of the autoencoder, whose axes have another scale."
    )
    figures.save_figure(figure, path, caption, "Two-dimensional latents")


def _draw_divergences(path: Path, divergence: Tensor) -> None:
    figure, axes = figures.figure_with(6.5, 2.8, "", "")
    axes.bar(range(1, len(divergence) + 1), (divergence / math.log(2)).tolist(), color=figures.SERIES[0])
    axes.set_xlabel("latent dimension, by its divergence")
    axes.set_ylabel("KL (bits per position)")
    caption = "Dimensions near zero are not used: their posterior is the prior, and the decoder ignores them."
    figures.save_figure(figure, path, caption, "KL divergence of each latent dimension of the VAE")


@torch.no_grad()
def _draw_interpolations(path: Path, models: dict[str, VQVAE], examples: Examples) -> None:
    labels = examples.test_labels
    first = 0
    second = 1 if labels is None else int((labels != labels[0]).nonzero()[0])
    pair = to_float(examples.test[[first, second]])
    shares = torch.linspace(0, 1, 7)
    rows, names = [], []
    for name in ("autoencoder", "vae", "vq-vae"):
        model = models[name]
        start, end = model.encoder(pair).unbind()
        features = torch.stack([start.lerp(end, float(share)) for share in shares])
        codes, _, _ = model.adapter.quantize(features)
        rows.append(model.decoder(codes).clamp(0, 1))
        names.append(_NAMES[name])
    rows.append(torch.stack([pair[0].lerp(pair[1], float(share)) for share in shares]))
    names.append("pixels")
    plots.save_grid(
        path,
        rows,
        names,
        [f"{float(share):.2f}" for share in shares],
        title="Between two held-out images",
        caption="Features between those of two images, decoded; the VQ-VAE replaces them by codes first. The grid of"
        " features keeps positions, so that all of them resemble the mixture of the pixels in the last row.",
        captioned=False,
    )


def _rows(metrics: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in metrics["table"]:
        name, _, more = row["model"].partition(", ")
        rows.append(
            [
                _NAMES[name] + (f", {more}" if more else ""),
                f"{row['latent_bits']:.0f}",
                f"{row['psnr_db']:.2f}",
                f"{row['elbo_bits']:.3f}",
            ]
        )
    return rows


def write_ladder_page(folder: StrPath, metrics: dict[str, Any]) -> Path:
    """Write index.html beside the pictures that it shows, and return its path."""
    positions, size = metrics["positions"], metrics["codebook_size"]
    angles = metrics["subspace_degrees"]
    few, many = next(iter(angles)), list(angles)[-1]
    spread = metrics["plane_spread"]
    linear: list[Part] = [
        f"Linear data x = A z + v have a subspace that is known. From {few} data, the principal components deviate from"
        f" it by up to {angles[few]:.1f} degrees, from {many} by {angles[many]:.1f}.",
        Picture("subspace.png", "Largest principal angle over the number of data"),
    ]
    latents: list[Part] = [
        "An autoencoder may put its latents anywhere. A VAE pays for each latent by its divergence from a standard"
        f" normal distribution: its latents have a standard deviation of {spread['vae']['deviation']:.2f}, those of the"
        f" autoencoder one of {spread['autoencoder']['deviation']:.2f}.",
        Picture("latents.png", "Two latents of each held-out image, by class"),
        Picture("divergence.png", "KL divergence of each latent dimension"),
        Picture("interpolations.png", "Interpolations between two images by three models"),
    ]
    bits = positions * math.log2(size)
    table: list[Part] = [
        f"All models have the same encoder and decoder, except PCA, and nearly the same number of bits: {positions}"
        f" numbers of log2 {size} bits each. Those of PCA and of the autoencoder are rounded to {size} levels; the VAE"
        " has the bits of its KL divergence. The likelihood of the pixels is a discretized logistic distribution with"
        " one scale for each model, the most likely one on training images.",
        TextTable(["model", "bits of the latents", "PSNR (dB)", "negative ELBO (bits per dimension)"], _rows(metrics)),
        f"Under the uniform prior, the KL term of a VQ-VAE is constant: {positions} x log2 {size} = {bits:.0f} bits,"
        " whatever the image. A learned prior makes it smaller without a change to the model.",
        f"How many images can a decoder output? One for each grid of indices: {size}^{positions}, a number of"
        f" {math.floor(metrics['log10_of_decodable_images']) + 1} digits. With 512 codes on a 32 x 32 grid it"
        f" is 512^1024, of {math.floor(metrics['log10_of_decodable_images_32x32x512']) + 1} digits.",
    ]
    made: list[Part] = [
        f"`fastvq demo ladder`: {metrics['total_seconds']:.0f} s on {metrics['threads']} threads, {metrics['steps']}"
        f" steps for each model, {metrics['prior_steps']} for the prior. All numbers: `metrics.json`.",
    ]
    return write_page(
        folder,
        "From PCA to the VQ-VAE",
        f"Five models of {metrics['train_images']} images ({metrics['data']}), measured on {metrics['test_images']}"
        " held-out ones.",
        [
            Section("1. Linear data: PCA", linear),
            Section("2. Latents: autoencoder and VAE", latents),
            Section("3. Bits and quality", table),
            Section("How this was made", made),
        ],
    )
