"""What the demo says of samples and of sizes."""

from __future__ import annotations

from typing import Any

import torch

from fastvq import coding
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.models import VQVAE, Prior
from fastvq.runs.indices import Codes
from fastvq.training.evaluation import reconstruct

from .classifier import STEPS, agreement, train_classifier
from .image_formats import format_sizes

_SAMPLES_PER_CLASS = 30
_LABELS = {
    "uniform": "codes, log2 K bits each",
    "huffman": "codes, Huffman (ideal, without its table)",
    "static": "codes, static model",
    "adaptive": "codes, adaptive model",
}


def judge_samples(
    prior: Prior, model: VQVAE, images: Images, sampling: dict[str, Any], *, steps: int = STEPS
) -> dict[str, Any]:
    """Shares of samples and images that a classifier, trained on real images, puts into their class.

    Returns:
        "sample_agreement" of samples drawn with the settings `sampling`, "plain_sample_agreement" of samples drawn
        without any, "real_agreement" of held-out images and "reconstruction_agreement" of their reconstructions; all
        None where there are no classes.
    """
    names = ("sample_agreement", "plain_sample_agreement", "real_agreement", "reconstruction_agreement")
    if not prior.classes or images.test_labels is None:
        return dict.fromkeys(names)
    judge = train_classifier(images, steps=steps)
    labels = torch.arange(prior.classes).repeat_interleave(_SAMPLES_PER_CLASS)
    results: list[float] = []
    for settings in (sampling, {}):
        codes = prior.sample(len(labels), labels, generator=torch.Generator().manual_seed(1), **settings)
        with torch.no_grad():
            drawn = torch.cat([model.decode(part).clamp(0, 1) for part in codes.split(250)])
        results.append(agreement(judge, drawn, labels))
    originals = to_float(images.test)
    restored = torch.cat([reconstruct(model, part)[0] for part in originals.split(250)])
    results += [agreement(judge, pictures, images.test_labels) for pictures in (originals, restored)]
    return dict(zip(names, results, strict=True)) | {"judged_samples": len(labels)}


def measure_sizes(
    images: Images, codes: Codes, codebook_size: int, *, psnr_db: float, prior_bits: float, prior_file: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Bits a code by each model, and the sizes of all held-out images: as pixels, in the usual formats, as codes.

    Args:
        psnr_db: of the images that codes are decoded to.
        prior_bits: that the prior takes for all codes, ideally.
        prior_file: bytes of the file coded with it.
    """
    pixels = images.test.numel()
    measured = coding.measure(codes.test.long(), codebook_size)
    bits = {name: size["bits_per_index"] for name, size in measured.items()}
    bits["prior"] = prior_bits / codes.test.numel()
    sizes: list[dict[str, Any]] = [
        {"name": "pixels", "bytes": pixels, "psnr_db": None},
        *format_sizes(images.test, psnr_db),
        *({"name": _LABELS[name], "bytes": int(measured[name]["bytes"]), "psnr_db": psnr_db} for name in _LABELS),
        {"name": "codes, learned prior (ideal, class known)", "bytes": round(prior_bits / 8), "psnr_db": psnr_db},
        {"name": "codes, learned prior, whole file with labels", "bytes": prior_file, "psnr_db": psnr_db},
    ]
    return bits, [size | {"bits_per_dimension": 8 * size["bytes"] / pixels} for size in sizes]
