"""Page of a run, index.html in its folder: what it has learned, in pictures, figures and settings."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

from fastvq.data.registry import name_of
from fastvq.errors import counted, with_article
from fastvq.extras import clock
from fastvq.files import StrPath
from fastvq.modalities import Modality, modality_of
from fastvq.modalities.settings import Settings
from fastvq.training.checkpoint import Checkpoint, checkpoint_folders, load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.metrics import Record, read_metrics

from .evaluate import FILE, measures_of, rows_of
from .judge import FILE as SAMPLES_FILE
from .judge import identity
from .judge import rows_of as rows_of_samples
from .load import PRIOR_FOLDER
from .page import PAGE, Media, Part, Picture, Section, TextTable, write_page
from .pictures import MEDIA

_KIND = "fastvq, page of a run"


def samples_of(modality: Modality) -> dict[str, str]:
    """Return what the pictures of a run's prior show, by the names of their files."""
    many = modality.noun[1]
    return {
        "samples": f"Samples of the prior beside held-out {many}",
        "completions": f"Held-out {many}, completed from their {modality.first_half}",
        "neighbors": f"Samples beside their nearest training {many}",
    }


def write_run_page(run: StrPath) -> Path:
    """Write the page of a run from what is in its folder, and return its path.

    It is written again whenever a command adds something: a picture, an evaluation, a prior. A page of something else,
    such as that of the demo, is left as it is.

    Raises:
        CheckpointError: the run has no checkpoint, or its records are damaged.
    """
    folder = Path(run)
    if (folder / PAGE).exists() and _KIND not in (folder / PAGE).read_text(errors="replace"):
        return folder / PAGE
    checkpoint = load_latest(folder, tensors=False)
    latest = latest_record(folder)
    step, steps = checkpoint.step, checkpoint.config.steps
    state = counted(step, "step") if checkpoint.finished else f"step {step} of {steps}"
    introduction = f"A VQ-VAE, trained on {name_of(checkpoint.config.data)}: {state} in {clock(checkpoint.seconds)}."
    modality = modality_of(checkpoint.config.modality)
    quality = quality_in(latest, modality.name)
    if quality is not None:
        introduction += f" Held-out {modality.noun[1]} are decoded with {quality}."
    sections = [
        *_training(folder, latest, modality),
        *_evaluation(folder, step, modality),
        *_prior(folder, modality),
        _settings(folder, checkpoint, modality),
    ]
    return write_page(folder, folder.resolve().name, introduction, sections, kind=_KIND)


def latest_record(folder: StrPath) -> Record:
    """Return the latest evaluation in the records of a training, or an empty record."""
    path = Path(folder) / "metrics.jsonl"
    tests = [record for record in read_metrics(path) if record["split"] == "test"] if path.exists() else []
    return tests[-1] if tests else {}


def quality_in(record: Record, modality: str) -> str | None:
    """Return the quality of reconstructions in a record as text, such as "23.92 dB"; None if there is none."""
    for name, measure in modality_of(modality).measures.items():
        if record.get(name) is not None:
            return measure.text(record[name])
    return None


def _training(folder: Path, latest: Record, modality: Modality) -> list[Section]:
    one, many = modality.noun
    explained = (
        f"The encoder turns {with_article(one)} into a grid of vectors, each of which is replaced by the nearest code."
        " The decoder receives nothing but the indices of these codes."
    )
    pictures = {
        "reconstructions": f"Held-out {many} above their reconstructions",
        "indices": f"{many.capitalize()}, their indices as colored grids, and the reconstructions from them",
        "scales": f"Held-out {many}, decoded from the indices of each scale alone",
        "usage": "Number of times that each code is chosen",
        "curves": "Loss, quality and perplexity over the steps of the training",
    }
    shown = {name: Picture(f"{name}.png", description) for name, description in pictures.items()}
    moving = Media(f"{MEDIA}/reconstructions", f"Held-out {many}, original and decoded")
    candidates = [
        Section(f"{many.capitalize()} and their reconstructions", [shown["reconstructions"], moving]),
        Section(f"{many.capitalize()} as indices", [explained, shown["indices"]]),
        Section("Scales", [shown["scales"], Media(f"{MEDIA}/scales", f"Held-out {one}")]),
        Section("Use of the codebook", [*_use(latest, modality), shown["usage"]]),
        Section("Training", [shown["curves"]]),
    ]
    return [section for section in candidates if _has_picture(folder, section)]


def _use(latest: Record, modality: Modality) -> list[str]:
    if latest.get("perplexity") is None or latest.get("usage") is None:
        return []
    return [
        f"The held-out {modality.noun[1]} use {latest['usage']:.0%} of the codes. The perplexity is"
        f" {latest['perplexity']:.0f}: the indices carry as much information as that many equally likely ones."
    ]


def _has_picture(folder: Path, section: Section) -> bool:
    return any((folder / part.name).exists() for part in section.parts if isinstance(part, Picture))


def _evaluation(folder: Path, step: int, modality: Modality) -> list[Section]:
    """Return the section of the latest `fastvq evaluate`, if its file is there and of this form."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        record = json.loads((folder / FILE).read_text())
        earlier = "" if record["step"] == step else f" after step {record['step']}, before the training went on"
        parts: list[Part] = [
            f"{record['data']}: {counted(record['examples'], *modality.noun)}, measured by `fastvq evaluate`{earlier}."
        ]
        parts.append(TextTable(["measure", "value", f"{record['confidence']:.0%} interval"], rows_of(record, modality)))
        refused = [[measures_of(modality)[name].label, reason] for name, reason in record["refused"].items()]
        if refused:
            parts.append(TextTable(["measure", "why it is not measured"], refused, folded="What is not measured"))
        return [Section("Evaluation", parts)]
    return []


def _prior(folder: Path, modality: Modality) -> list[Section]:
    place = folder / PRIOR_FOLDER
    if not checkpoint_folders(place):
        return []
    parts: list[Part] = []
    checkpoint = load_latest(place, PriorConfig, tensors=False)
    bits = latest_record(place).get("bits_per_index")
    kind, steps = checkpoint.config.kind, counted(checkpoint.step, "step")
    trained = f"A prior of kind {kind} has learned the distribution of the indices in {steps}."
    parts.append(
        trained
        + ("" if bits is None else f" An index of a held-out {modality.noun[0]} takes {bits:.2f} bits under it.")
    )
    parts.append(Picture(f"{PRIOR_FOLDER}/curves.png", "Bits per index over the steps of the prior's training"))
    played = {"samples": "Samples", "completions": f"Held-out {modality.noun[1]}, original, decoded and completed"}
    for name, description in samples_of(modality).items():
        parts.append(Picture(f"{name}.png", description))
        parts += [Media(f"{MEDIA}/{name}", played[name])] if name in played else []
    parts += _judged(folder, checkpoint, modality)
    parts.append(_all_settings("All settings of the prior", checkpoint.config))
    return [Section("The prior", parts)]


def _judged(folder: Path, prior: Checkpoint, modality: Modality) -> list[Part]:
    """Return the table of the latest `fastvq evaluate --samples`, if it is of this prior."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        record = json.loads((folder / SAMPLES_FILE).read_text())
        if record["of"] == identity(prior):
            one, many = modality.noun
            given = ", ".join(f"{name} {value}" for name, value in record["sampling"].items())
            text = (
                f"{counted(record['count'], 'sample')}, judged by `fastvq evaluate --samples` in the features of the"
                f" {record['features']}" + (f", sampled with {given}." if given else ".")
            )
            head = ["measure", "samples", f"decoded held-out {many}"]
            return [text, TextTable(head, [list(row) for row in rows_of_samples(record, one, many)])]
    return []


def _settings(folder: Path, checkpoint: Checkpoint, modality: Modality) -> Section:
    config, run = checkpoint.config, shlex.quote(str(folder))
    parts: list[Part] = []
    changed = {name: here for name, (here, _) in config.differences(type(config)()).items()}
    if changed:
        rows = [[f"`{name}`", str(value)] for name, value in changed.items()]
        parts.append(TextTable(["setting", "value, where it is not the default"], rows))
    parts.append(_all_settings("All settings", config))
    commands = [
        ["measure it", f"`fastvq evaluate {run}`"],
        [f"decode {modality.noun[1]} of your own", f"`fastvq reconstruct {run} FILE --out picture.png`"],
        ["learn a prior", f"`fastvq prior {run}`"],
        ["draw new samples", f"`fastvq sample {run}`"],
        ["continue to more steps", f"`fastvq train --out {run} --resume --steps {2 * checkpoint.config.steps}`"],
        ["use it in Python", f"`fastvq.load({str(folder)!r})`"],
    ]
    parts.append(TextTable(["what next", "command"], commands))
    return Section("Settings", parts)


def _all_settings(title: str, config: Settings) -> TextTable:
    rows: list[list[str]] = [[f"`{name}`", _value(value)] for name, value in config.to_json().items()]
    return TextTable(["setting", "value"], rows, folded=title)


def _value(value: Any) -> str:
    return "" if value is None else str(value)
