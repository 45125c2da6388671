"""Page of the demo, index.html: all pictures and tables in order, for readers new to the subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvq.files import StrPath
from fastvq.runs.page import Part, Picture, Section, TextTable, write_page


def write_demo_page(folder: StrPath, metrics: dict[str, Any]) -> Path:
    """Write index.html beside the pictures that it shows, and return its path."""
    return write_page(
        folder,
        "From images to indices, to new images and small files",
        f"A VQ-VAE was trained on {metrics['train_images']} images ({metrics['data']}). All measures below are taken on"
        f" {metrics['test_images']} held-out images.",
        [_autoencoder(metrics), _prior(metrics), _compression(metrics), _settings(metrics)],
    )


def _autoencoder(metrics: dict[str, Any]) -> Section:
    count, size = metrics["indices_per_image"], metrics["codebook_size"]
    parts: list[Part] = [
        f"The encoder turns an image into a grid of {count} vectors. Each vector is replaced by the nearest of"
        f" {size} learned code vectors, and only the index of that code is kept. The decoder receives nothing but these"
        " indices.",
        Picture("indices.png", "Images, their indices as colored grids, and the reconstructions from them"),
        f"How much is lost? The decoded images reach {metrics['psnr_db']:.2f} dB (peak signal-to-noise ratio: 10"
        " dB more is a tenth of the squared error). The same network without a bottleneck, which passes on"
        f" {count} vectors of floats, reaches {metrics['ceiling_psnr_db']:.2f} dB after {metrics['ceiling_steps']}"
        " steps: the difference is the price of quantization.",
        Picture("reconstructions.png", "Held-out images above their reconstructions"),
        f"A codebook can collapse onto few codes. Here the held-out images use {metrics['usage']:.0%} of the codes."
        f" The perplexity is {metrics['perplexity']:.0f}: the codes carry as much information as that many equally"
        " likely ones.",
        Picture("usage.png", "Number of times that each code is chosen"),
        Picture("curves.png", "Loss, PSNR and perplexity over the training steps"),
    ]
    return Section("1. An image becomes a few indices", parts)


def _prior(metrics: dict[str, Any]) -> Section:
    given = ", given the class" if metrics["classes"] else ""
    bits, count, kl = metrics["bits_per_index"], metrics["indices_per_image"], metrics["kl_bits_per_image"]
    parts: list[Part] = [
        "While the VQ-VAE trains, its prior is uniform: every grid of indices is equally likely, and the KL term of"
        f" the bound is constant, {count} times log2 {metrics['codebook_size']}, {kl:.0f} bits per image. Afterwards a"
        " transformer learns the distribution of the indices. Under this prior a held-out image takes"
        f" {metrics['prior_bits_per_image']:.0f} bits, {kl - metrics['prior_bits_per_image']:.0f} fewer than under the"
        " uniform one.",
        TextTable(
            ["model of the indices", "bits per index"],
            [
                ["uniform (log2 K)", f"{bits['uniform']:.2f}"],
                ["frequency of each index (static, its table included)", f"{bits['static']:.2f}"],
                ["frequency of each index, in whole bits (Huffman, without its table)", f"{bits['huffman']:.2f}"],
                ["conditional on the neighbors (adaptive)", f"{bits['adaptive']:.2f}"],
                ["learned prior" + given, f"{bits['prior']:.2f}"],
            ],
        ),
        "The curve shows the training of the prior: the better it predicts the next index of a grid, the fewer bits"
        " that index takes. The dotted line is the uniform prior. The dots are the held-out images: while they fall,"
        " the prior generalizes to images that it was not trained on.",
        Picture("prior/curves.png", "Bits per index over the steps of the prior's training"),
        "A prior can also be sampled. Indices are drawn one after the other, each from the prior's distribution"
        " given the indices before it, and decoded to pixels.",
        Picture("samples.png", "Samples of the prior beside real images"),
    ]
    if metrics["sample_agreement"] is not None:
        parts += [
            "Do samples belong to their class? A small classifier, trained on real images, assigns"
            f" {metrics['sample_agreement']:.0%} of {metrics['judged_samples']} samples to the requested class. It is"
            f" right for {metrics['real_agreement']:.0%} of the real held-out images and for"
            f" {metrics['reconstruction_agreement']:.0%} of their reconstructions. These samples favor their class and"
            f" likely indices ({metrics['sampling']}); of samples drawn without these settings,"
            f" {metrics['plain_sample_agreement']:.0%} agree.",
        ]
    parts += [
        "Are samples copies? Here some samples stand beside their nearest training images, pixel by pixel.",
        Picture("neighbors.png", "Samples and their nearest training images"),
        "Half an image can be completed: the indices of the upper half are given, and the prior samples the others.",
        Picture("completions.png", "Upper halves of held-out images, completed three times"),
    ]
    return Section("2. The distribution of the indices: the prior", parts)


def _compression(metrics: dict[str, Any]) -> Section:
    labels = ", and the labels are in the file" if metrics["classes"] else ""
    rows = []
    for size in metrics["sizes"]:
        psnr = "lossless" if size["psnr_db"] is None else f"{size['psnr_db']:.2f} dB"
        rows.append([size["name"], f"{size['bytes']:,}", f"{size['bits_per_dimension']:.3f}", psnr])
    parts: list[Part] = [
        "Given a model's probability p of an index, a range coder writes the index in about -log2 p bits. The"
        " decoder computes the same probabilities and recovers the same indices. All"
        f" {metrics['test_images']} held-out images in one file:",
        TextTable(["held-out images as", "bytes", "bits per pixel", "PSNR"], rows),
        "The lines from log2 K on hold the same indices, and so the same pictures. A file coded with the prior can"
        " be read only with that prior; its probabilities are computed in integers and are therefore equal on every"
        f" machine{labels}. PNG and WebP hold all images on one sheet, which saves headers.",
    ]
    return Section("3. Small files", parts)


def _settings(metrics: dict[str, Any]) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    parts: list[Part] = [
        f"`make demo`: {metrics['total_seconds']:.0f} s in all on {metrics['threads']} threads;"
        f" {metrics['seconds']:.0f} s for {metrics['steps']} steps of the VQ-VAE, {metrics['prior_seconds']:.0f} s for"
        f" {metrics['prior_steps']} of the prior. {versions}. All numbers: `metrics.json`.",
    ]
    return Section("How this was made", parts)
