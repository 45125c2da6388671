"""runs/demo/index.html: all pictures and tables of the demo in order, for a reader of an introductory article."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvq.files import whole

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } code { background: #f3f3f3; }
"""


def write_page(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write index.html beside the pictures that it shows, and return its path."""
    sections = [*_autoencoder(metrics), *_prior(metrics), *_compression(metrics), *_made(metrics)]
    body = "\n".join(part for part in sections if not part.startswith("<img") or (folder / _source(part)).exists())
    path = folder / "index.html"
    with whole(path) as partial:
        partial.write_text(
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>fastvq: the demo</title>\n'
            f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n{body}\n</html>\n',
            encoding="utf-8",
        )
    return path


def _autoencoder(metrics: dict[str, Any]) -> list[str]:
    codes, size = metrics["indices_per_image"], metrics["codebook_size"]
    return [
        "<h1>From images to integers, to new images and small files</h1>",
        f"<p>A VQ-VAE learned {metrics['train_images']} small pictures of clothes. All measures below are of"
        f" {metrics['test_images']} others, which it never saw.</p>",
        "<h2>1. An image becomes a few integers</h2>",
        f"<p>The encoder turns an image into a grid of {codes} vectors. Each is replaced by the nearest of {size}"
        " learned vectors, the codes: what is left of the image is which ones. The decoder sees nothing but these"
        " integers.</p>",
        _image("codes.png", "Images, their codes as coloured grids, and what is decoded from them"),
        f"<p>How much is lost? The decoded images reach {metrics['psnr_db']:.2f} dB (peak signal-to-noise ratio: 10"
        " dB more is a tenth of the squared error). The same network without a bottleneck, which may pass on"
        f" {codes} vectors of floats, reaches {metrics['ceiling_psnr_db']:.2f} dB after {metrics['ceiling_steps']}"
        " steps: the difference is the price of integers.</p>",
        _image("reconstructions.png", "Held-out images above what is decoded from their codes"),
        f"<p>A codebook can collapse onto few codes. Here the held-out images use {metrics['usage']:.0%} of it, as"
        f" evenly as if {metrics['perplexity']:.0f} codes were equally likely (the perplexity).</p>",
        _image("usage.png", "How often each code is chosen"),
        _image("curves.png", "Loss, PSNR and perplexity over the steps of training"),
    ]


def _prior(metrics: dict[str, Any]) -> list[str]:
    bits, codes, kl = metrics["bits_per_index"], metrics["indices_per_image"], metrics["kl_bits_per_image"]
    parts = [
        "<h2>2. Which integers go together: the prior</h2>",
        "<p>While the VQ-VAE trains, every grid of codes counts as equally likely, so that the KL term of its bound"
        f" is a constant: {codes} codes at log2 {metrics['codebook_size']} bits, {kl:.0f} bits an image. Afterwards a"
        " transformer learns which codes follow which. Under this prior a held-out image is worth"
        f" {metrics['prior_bits_per_image']:.0f} bits: the uniform prior was off by"
        f" {kl - metrics['prior_bits_per_image']:.0f} of {kl:.0f}.</p>",
        _table(
            ["model of the codes", "bits a code"],
            [
                ["all codes alike (log2 K)", f"{bits['uniform']:.2f}"],
                ["how frequent each is (static, its table included)", f"{bits['static']:.2f}"],
                ["the same in whole bits (Huffman, without its table)", f"{bits['huffman']:.2f}"],
                ["after its neighbours (adaptive)", f"{bits['adaptive']:.2f}"],
                ["the learned prior, given the class", f"{bits['prior']:.2f}"],
            ],
        ),
        "<p>The curve shows it learn: the better it predicts the next code of a grid, the fewer bits that code takes."
        " The dotted line is a prior to which all codes are alike. The dots are the held-out images: as long as they"
        " fall, what it learns holds for images that it never saw, too.</p>",
        _image("prior/curves.png", "Bits a code over the steps of the prior's training"),
        "<p>What predicts can also make up. Codes are drawn one after the other, each from the prior's probabilities"
        " after those before it, and decoded to pixels.</p>",
        _image("samples.png", "Images drawn by class beside real ones"),
    ]
    if metrics["sample_agreement"] is not None:
        parts += [
            "<p>Are they what they should be? A small classifier that learned from real images puts"
            f" {metrics['sample_agreement']:.0%} of {metrics['judged_samples']} samples into the class that was asked"
            f" for. It is right about {metrics['real_agreement']:.0%} of the real held-out images, and about"
            f" {metrics['reconstruction_agreement']:.0%} of their reconstructions. The samples lean on their class"
            f" and avoid unlikely codes ({html.escape(metrics['sampling'])}); drawn plainly,"
            f" {metrics['plain_sample_agreement']:.0%} of them agree.</p>",
        ]
    return [
        *parts,
        "<p>Are they copies? Beside some samples, the training images that are nearest to them, pixel by pixel.</p>",
        _image("neighbours.png", "Samples and the training images nearest to them"),
        "<p>And half an image can be completed: the codes of the upper half are given, the prior draws the others.</p>",
        _image("completions.png", "Upper halves of held-out images, completed three times"),
    ]


def _compression(metrics: dict[str, Any]) -> list[str]:
    rows = []
    for size in metrics["sizes"]:
        psnr = "lossless" if size["psnr_db"] is None else f"{size['psnr_db']:.2f} dB"
        rows.append([size["name"], f"{size['bytes']:,}", f"{size['bits_per_dimension']:.3f}", psnr])
    return [
        "<h2>3. Small files</h2>",
        "<p>Where a model says how likely each code is, a range coder writes it in as many bits as that is worth:"
        " -log2 p. The decoder computes the same probabilities and gets the same codes back. All"
        f" {metrics['test_images']} held-out images in one file:</p>",
        _table(["held-out images as", "bytes", "bits a pixel", "PSNR"], rows),
        "<p>The lines from log2 K on are the same codes, and so the same pictures. With the prior, which each reader"
        " of the file has to have, its probabilities are computed in integers, so that they are the same on every"
        " machine; labels are in the file. PNG and WebP have all images on one sheet, which spares them headers.</p>",
    ]


def _made(metrics: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return [
        "<h2>How this was made</h2>",
        f"<p><code>make demo</code>: {metrics['total_seconds']:.0f} s in all on {metrics['threads']} threads;"
        f" {metrics['seconds']:.0f} s for {metrics['steps']} steps of the VQ-VAE, {metrics['prior_seconds']:.0f} s for"
        f" {metrics['prior_steps']} of the prior. {html.escape(versions)}. All numbers: <code>metrics.json</code>.</p>",
    ]


def _image(name: str, text: str) -> str:
    return f'<img src="{name}" alt="{html.escape(text)}">'


def _source(image: str) -> str:
    return image.split('"')[1]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", heads) + "".join(line("td", row) for row in rows) + "</table>"
