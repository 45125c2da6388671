"""Page of the demo, index.html: all pictures and tables in order, for readers new to the subject."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvq.files import StrPath, write_whole
from fastvq.runs.plots import caption_of

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; overflow-x: auto; }
img { width: 100%; min-width: 40rem; height: auto; display: block; }
figcaption { color: #444; font-size: .9rem; margin-top: .4rem; position: sticky; left: 0; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } code { background: #f3f3f3; }
"""


class _Picture(NamedTuple):
    """A picture of the page: its file, and what it shows in words."""

    name: str
    description: str


def write_page(folder: StrPath, metrics: dict[str, Any]) -> Path:
    """Write index.html beside the pictures that it shows, and return its path.

    Pictures that do not exist are left out. Their captions are text: on a narrow screen it stays readable, while a
    picture keeps the width that its labels need and scrolls.
    """
    folder = Path(folder)
    sections = [*_autoencoder(metrics), *_prior(metrics), *_compression(metrics), *_settings(metrics)]
    shown = (_figure(folder, part) if isinstance(part, _Picture) else part for part in sections)
    body = "\n".join(part for part in shown if part)
    path = folder / "index.html"
    write_whole(
        path,
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>fastvq: the demo</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n{body}\n</html>\n',
    )
    return path


def _autoencoder(metrics: dict[str, Any]) -> list[str | _Picture]:
    count, size = metrics["indices_per_image"], metrics["codebook_size"]
    return [
        "<h1>From images to indices, to new images and small files</h1>",
        f"<p>A VQ-VAE was trained on {metrics['train_images']} images ({html.escape(metrics['data'])}). All"
        " measures below are taken"
        f" on {metrics['test_images']} held-out images.</p>",
        "<h2>1. An image becomes a few indices</h2>",
        f"<p>The encoder turns an image into a grid of {count} vectors. Each vector is replaced by the nearest of"
        f" {size} learned code vectors, and only the index of that code is kept. The decoder receives nothing but these"
        " indices.</p>",
        _Picture("indices.png", "Images, their indices as colored grids, and the reconstructions from them"),
        f"<p>How much is lost? The decoded images reach {metrics['psnr_db']:.2f} dB (peak signal-to-noise ratio: 10"
        " dB more is a tenth of the squared error). The same network without a bottleneck, which passes on"
        f" {count} vectors of floats, reaches {metrics['ceiling_psnr_db']:.2f} dB after {metrics['ceiling_steps']}"
        " steps: the difference is the price of quantization.</p>",
        _Picture("reconstructions.png", "Held-out images above their reconstructions"),
        f"<p>A codebook can collapse onto few codes. Here the held-out images use {metrics['usage']:.0%} of the codes."
        f" The perplexity is {metrics['perplexity']:.0f}: the codes carry as much information as that many equally"
        " likely ones.</p>",
        _Picture("usage.png", "Number of times that each code is chosen"),
        _Picture("curves.png", "Loss, PSNR and perplexity over the training steps"),
    ]


def _prior(metrics: dict[str, Any]) -> list[str | _Picture]:
    given = ", given the class" if metrics["classes"] else ""
    bits, count, kl = metrics["bits_per_index"], metrics["indices_per_image"], metrics["kl_bits_per_image"]
    parts: list[str | _Picture] = [
        "<h2>2. The distribution of the indices: the prior</h2>",
        "<p>While the VQ-VAE trains, its prior is uniform: every grid of indices is equally likely, and the KL term of"
        f" the bound is constant, {count} times log2 {metrics['codebook_size']}, {kl:.0f} bits per image. Afterwards a"
        " transformer learns the distribution of the indices. Under this prior a held-out image takes"
        f" {metrics['prior_bits_per_image']:.0f} bits, {kl - metrics['prior_bits_per_image']:.0f} fewer than under the"
        " uniform one.</p>",
        _table(
            ["model of the indices", "bits per index"],
            [
                ["uniform (log2 K)", f"{bits['uniform']:.2f}"],
                ["frequency of each index (static, its table included)", f"{bits['static']:.2f}"],
                ["frequency of each index, in whole bits (Huffman, without its table)", f"{bits['huffman']:.2f}"],
                ["conditional on the neighbors (adaptive)", f"{bits['adaptive']:.2f}"],
                ["learned prior" + given, f"{bits['prior']:.2f}"],
            ],
        ),
        "<p>The curve shows the training of the prior: the better it predicts the next index of a grid, the fewer bits"
        " that index takes. The dotted line is the uniform prior. The dots are the held-out images: while they fall,"
        " the prior generalizes to images that it was not trained on.</p>",
        _Picture("prior/curves.png", "Bits per index over the steps of the prior's training"),
        "<p>A prior can also be sampled. Indices are drawn one after the other, each from the prior's distribution"
        " given the indices before it, and decoded to pixels.</p>",
        _Picture("samples.png", "Samples of the prior beside real images"),
    ]
    if metrics["sample_agreement"] is not None:
        parts += [
            "<p>Do samples belong to their class? A small classifier, trained on real images, assigns"
            f" {metrics['sample_agreement']:.0%} of {metrics['judged_samples']} samples to the requested class. It is"
            f" right for {metrics['real_agreement']:.0%} of the real held-out images and for"
            f" {metrics['reconstruction_agreement']:.0%} of their reconstructions. These samples favor their class and"
            f" likely indices ({html.escape(metrics['sampling'])}); of samples drawn without these settings,"
            f" {metrics['plain_sample_agreement']:.0%} agree.</p>",
        ]
    return [
        *parts,
        "<p>Are samples copies? Here some samples stand beside their nearest training images, pixel by pixel.</p>",
        _Picture("neighbors.png", "Samples and their nearest training images"),
        "<p>Half an image can be completed: the indices of the upper half are given, and the prior samples the"
        " others.</p>",
        _Picture("completions.png", "Upper halves of held-out images, completed three times"),
    ]


def _compression(metrics: dict[str, Any]) -> list[str]:
    labels = ", and the labels are in the file" if metrics["classes"] else ""
    rows = []
    for size in metrics["sizes"]:
        psnr = "lossless" if size["psnr_db"] is None else f"{size['psnr_db']:.2f} dB"
        rows.append([size["name"], f"{size['bytes']:,}", f"{size['bits_per_dimension']:.3f}", psnr])
    return [
        "<h2>3. Small files</h2>",
        "<p>Given a model's probability p of an index, a range coder writes the index in about -log2 p bits. The"
        " decoder computes the same probabilities and recovers the same indices. All"
        f" {metrics['test_images']} held-out images in one file:</p>",
        _table(["held-out images as", "bytes", "bits per pixel", "PSNR"], rows),
        "<p>The lines from log2 K on hold the same indices, and so the same pictures. A file coded with the prior can"
        " be read only with that prior; its probabilities are computed in integers and are therefore equal on every"
        f" machine{labels}. PNG and WebP hold all images on one sheet, which saves headers.</p>",
    ]


def _settings(metrics: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return [
        "<h2>How this was made</h2>",
        f"<p><code>make demo</code>: {metrics['total_seconds']:.0f} s in all on {metrics['threads']} threads;"
        f" {metrics['seconds']:.0f} s for {metrics['steps']} steps of the VQ-VAE, {metrics['prior_seconds']:.0f} s for"
        f" {metrics['prior_steps']} of the prior. {html.escape(versions)}. All numbers: <code>metrics.json</code>.</p>",
    ]


def _figure(folder: Path, picture: _Picture) -> str:
    """Return a picture and its caption as HTML, or an empty text if there is no such file."""
    path = folder / picture.name
    if not path.exists():
        return ""
    caption = caption_of(path)
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{picture.name}" alt="{html.escape(picture.description)}">{below}</figure>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", heads) + "".join(line("td", row) for row in rows) + "</table>"
