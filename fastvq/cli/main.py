"""The command line: `fastvq info`, `train`, `reconstruct`, `prior`, `sample`, `encode`, `decode`, `demo` and
`bench`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvq
from fastvq.errors import CodingError, ConfigError, FastvqError

from .options import add_settings, given_settings

if TYPE_CHECKING:
    from fastvq.training import TrainConfig

# What a shell reports for a program that Ctrl-C ended.
_INTERRUPTED = 130
_FAILED = 2
# Photographs rather than the small gray pictures that the defaults are for.
_FOLDER_SETTINGS: dict[str, Any] = {"image_size": 64, "grayscale": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for an error in what was asked for, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)

    try:
        return options.run(options)
    except (FastvqError, OSError, FloatingPointError) as error:
        print(f"fastvq: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("\nfastvq: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from fastvq.training.config import PriorConfig, TrainConfig

    parser = argparse.ArgumentParser(prog="fastvq", description="Exact vector quantization for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {fastvq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="which backends work here, and why the others don't")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    train = commands.add_parser("train", help="train a VQ-VAE on images")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --out")
    add_settings(train, TrainConfig)
    train.set_defaults(run=_train)

    reconstruct = commands.add_parser("reconstruct", help="send images through a trained model's codes")
    reconstruct.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    reconstruct.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGE", help="image files; default: held-out ones"
    )
    reconstruct.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    reconstruct.set_defaults(run=_reconstruct)

    prior = commands.add_parser(
        "prior",
        help="learn which codes follow which in a run's data",
        description="Learns in DIR/prior/ which codes follow which in a run's data, and says how many bits a code of"
        " held-out images is worth. An earlier prior there is replaced.",
    )
    prior.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    prior.add_argument("--resume", action="store_true", help="go on with an interrupted training, in its own settings")
    prior.add_argument(
        "--compare", type=float, metavar="SECONDS", help="only train each kind for so much processor time, and compare"
    )
    add_settings(prior, PriorConfig)
    prior.set_defaults(run=_prior)

    sample = commands.add_parser(
        "sample",
        help="draw new images with a run's prior",
        description="Draws new images with a run's prior. How OUT ends says what is written: .png, a picture of some"
        " samples of each class beside real images; .npy, the codes alone, which `fastvq encode` takes; without a"
        " suffix, a new folder of PNG files, with a subfolder for each class.",
    )
    sample.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    sample.add_argument("--out", type=Path, required=True, metavar="OUT", help="a .png, an .npy or a new folder")
    sample.add_argument("--count", type=int, metavar="N", help="how many, in an .npy or a folder (default: 100)")
    sample.add_argument(
        "--label", type=int, metavar="L", help="there, of this class only, from 0 on (default: all classes in turn)"
    )
    sample.add_argument(
        "--complete", action="store_true", help="a picture of lower halves to the upper ones of held-out images"
    )
    sample.add_argument("--temperature", type=float, default=1.0, help="below 1 for likelier samples (default: 1)")
    sample.add_argument("--top-k", type=int, help="draw among so many codes (default: all)")
    sample.add_argument(
        "--top-p", type=float, help="draw among the codes that have this probability together (default: 1)"
    )
    sample.add_argument("--guidance", type=float, default=1.0, help="above 1 leans on the class (default: 1)")
    sample.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same one draws the same samples, whatever N: fewer are the first of more (default: 0)",
    )
    sample.set_defaults(run=_sample)

    encode = commands.add_parser(
        "encode",
        help="write the codes of images, or of an array, to a small file",
        description="Writes the codes of images, or of an array, to a small file. Images are scaled and cropped to the "
        "square that the run's model knows; the file keeps their order, not their names.",
    )
    encode.add_argument(
        "source", type=Path, metavar="IN", help="an image, a folder of images, held-out, or codes in an .npy file"
    )
    encode.add_argument("out", type=Path, metavar="OUT", help="file to write")
    encode.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        dest="run_folder",
        help="the run whose model encodes images, or whose codes an .npy file holds",
    )
    encode.add_argument(
        "--model", default="adaptive", help="adaptive, static or the learned prior (default: %(default)s)"
    )
    encode.add_argument(
        "--codebook-size", type=int, help="of an .npy file; default: the run's, or the largest code + 1"
    )
    encode.set_defaults(run=_encode)

    decode = commands.add_parser("decode", help="get images, or an array of codes, back from a coded file")
    decode.add_argument("source", type=Path, metavar="IN", help="the file")
    decode.add_argument("out", type=Path, metavar="OUT", help="a new folder for images, or an .npy file for the codes")
    decode.add_argument("--run", type=Path, metavar="DIR", dest="run_folder", help="the run whose model decodes images")
    decode.add_argument("--max-indices", type=int, help="refuse a file of more (default: 67108864)")
    decode.set_defaults(run=_decode)

    demo = commands.add_parser("demo", help="train on the shipped images and show what came of it")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    demo.add_argument("--resume", action="store_true", help="go on with an interrupted demo")
    demo.add_argument("--steps", type=int, help="train for fewer or more steps than usual")
    demo.add_argument("--ceiling-steps", type=int, help="the same for the network without a bottleneck")
    demo.add_argument("--prior-steps", type=int, help="the same for the prior")
    demo.add_argument("--classifier-steps", type=int, help="the same for the classifier that judges samples")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="time the search of your shape beside other libraries, or run the suite")
    bench.add_argument("--n", type=int, default=16384, help="vectors (default: %(default)s)")
    bench.add_argument("--k", type=int, default=1024, help="codes (default: %(default)s)")
    bench.add_argument("--d", type=int, default=64, help="dimensions (default: %(default)s)")
    bench.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default: %(default)s)")
    bench.add_argument(
        "--data", default="clustered", help="gaussian, clustered, latents or an .npy file (default: %(default)s)"
    )
    bench.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    bench.add_argument("--threads", type=int, help="for every contestant; default: torch's")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured as JSON")
    bench.add_argument("--model", metavar="GPU", help="only predict the time on an a100, h100, b200 or mi300x")
    bench.add_argument(
        "--open-share", type=float, default=0.01, help="of rows that take a second scan there (default: %(default)s)"
    )
    bench.add_argument(
        "--suite", action="store_true", help="run the whole suite, about 13 minutes, and write its report"
    )
    bench.add_argument("--render", action="store_true", help="only write the report again from its JSON")
    bench.add_argument("--out", type=Path, default=Path("docs"), help="folder of the report (default: %(default)s)")
    bench.add_argument("--readme", type=Path, help="a README whose marked figures are brought up to date")
    bench.set_defaults(run=_bench)
    return parser


def _info(options: argparse.Namespace) -> int:
    from fastvq.backends import select as backends

    info = backends.info()
    print(json.dumps(info, indent=2) if options.json else backends.format_info(info))
    return 0


def _settings(options: argparse.Namespace) -> TrainConfig:
    """Return the settings asked for; a resumed run's own settings stand in for those not given."""
    from fastvq.training import TrainConfig
    from fastvq.training.checkpoint import load_latest
    from fastvq.training.config import FULL_DATA, SHIPPED_DATA

    given = given_settings(options, TrainConfig)
    data = given.get("data", SHIPPED_DATA)
    if data not in (SHIPPED_DATA, FULL_DATA):
        # Resuming from another working directory must find the same folder.
        given["data"] = str(Path(data).resolve())
    if options.resume:
        return dataclasses.replace(load_latest(options.out).config, **given)
    return TrainConfig(**(given if data in (SHIPPED_DATA, FULL_DATA) else _FOLDER_SETTINGS | given))


def _train(options: argparse.Namespace) -> int:
    from fastvq.runs.pictures import picture_reconstructions, picture_run
    from fastvq.training import Trainer, evaluate, load_images

    config = _settings(options)
    images = load_images(config)
    trainer = Trainer(config, images, options.out, resume=options.resume)
    print(f"{images.name}: {len(images.train)} images to learn from, {len(images.test)} held out")
    finished = trainer.fit(
        on_evaluation=lambda trainer, evaluation: picture_reconstructions(
            options.out, trainer.model, images, evaluation, step=trainer.step
        )
    )
    if not finished:
        again = f"fastvq train --out {shlex.quote(str(options.out))} --resume"
        print(f"stopped at step {trainer.step}, saved; go on with: {again}")
        return _INTERRUPTED
    evaluation = evaluate(trainer.model, images.test)
    pictures = picture_run(trainer, evaluation)
    perplexity = "" if evaluation.perplexity is None else f", perplexity {evaluation.perplexity:.0f}"
    print(f"{len(images.test)} held-out images: {evaluation.psnr_db:.2f} dB{perplexity}")
    print("pictures: " + ", ".join(str(path) for path in pictures))
    return 0


def _reconstruct(options: argparse.Namespace) -> int:
    from fastvq.runs.pictures import reconstruct_files, reconstruct_held_out

    if options.images:
        lines = reconstruct_files(options.run_folder, options.images, options.out)
    else:
        lines = reconstruct_held_out(options.run_folder, options.out)
    print("\n".join([*lines, f"picture: {options.out}"]))
    return 0


def _prior(options: argparse.Namespace) -> int:
    from fastvq.runs.pictures import picture_prior
    from fastvq.training import prior
    from fastvq.training.config import PriorConfig

    given = given_settings(options, PriorConfig)
    config = PriorConfig(**given)
    if options.compare is not None:
        from fastvq.runs.compare_priors import DECIDED, compare_priors

        useless = [name for name in DECIDED if name in given] + ["resume"] * options.resume
        if useless:
            raise ConfigError(f"--compare trains every kind anew for its time: leave out {', '.join(useless)}")
        print("\n".join(compare_priors(options.run_folder, options.compare, config=config)))
        return 0
    if options.resume:
        prior.check_resumed(options.run_folder, given)
    learned = prior.train_prior(options.run_folder, config, resume=options.resume)
    if learned is None:
        print(f"stopped, saved; go on with: fastvq prior {shlex.quote(str(options.run_folder))} --resume")
        return _INTERRUPTED
    model, codes = learned
    bits = prior.bits_per_index(model, codes.test, codes.test_labels)
    print(f"{len(codes.test)} held-out images: {bits:.2f} bits a code")
    print(f"picture: {picture_prior(options.run_folder)}")
    return 0


def _sample(options: argparse.Namespace) -> int:
    from fastvq.runs.sample_files import sample_run

    given = ("count", "label", "complete", "seed", "temperature", "top_k", "top_p", "guidance")
    try:
        lines = sample_run(options.run_folder, options.out, **{name: getattr(options, name) for name in given})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print("\n".join(lines))
    return 0


def _encode(options: argparse.Namespace) -> int:
    from fastvq.runs import compress

    if options.source.suffix == ".npy":
        how = {"model": options.model, "run": options.run_folder}
        lines = compress.encode_array(options.source, options.out, options.codebook_size, **how)
    elif options.run_folder is None:
        raise CodingError("--run: which run's model encodes the images?")
    else:
        lines = compress.encode_images(options.run_folder, options.source, options.out, model=options.model)
    print("\n".join(lines))
    return 0


def _decode(options: argparse.Namespace) -> int:
    from fastvq.runs import compress

    limit = {} if options.max_indices is None else {"max_indices": options.max_indices}
    if options.out.suffix == ".npy":
        lines = compress.decode_array(options.source, options.out, run=options.run_folder, **limit)
    elif options.run_folder is None:
        raise CodingError("--run: which run's model decodes the images? For the codes alone, OUT ends in .npy")
    else:
        lines = compress.decode_images(options.run_folder, options.source, options.out, **limit)
    print("\n".join(lines))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from fastvq.demo import run as demo

    config = demo.DEMO if options.steps is None else dataclasses.replace(demo.DEMO, steps=options.steps)
    prior = demo.DEMO_PRIOR
    if options.prior_steps is not None:
        prior = dataclasses.replace(prior, steps=options.prior_steps)
    given = {name: getattr(options, name) for name in ("ceiling_steps", "classifier_steps")}
    steps = {name: value for name, value in given.items() if value is not None}
    done = demo.run_demo(options.out, config=config, prior_config=prior, resume=options.resume, **steps)
    if done is None:
        given = {name: getattr(options, name) for name in ("steps", "ceiling_steps", "prior_steps", "classifier_steps")}
        again = "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None)
        print(f"stopped, saved; go on with: fastvq demo --out {shlex.quote(str(options.out))} --resume{again}")
        return _INTERRUPTED
    return 0


def _bench(options: argparse.Namespace) -> int:
    from fastvq.bench import commands

    if options.suite or options.render:
        lines = commands.write_suite(options.out, options.readme, render_only=options.render)
    elif options.model is not None:
        sizes = (options.n, options.k, options.d)
        how = {"dtype": options.dtype, "open_share": options.open_share, "json_path": options.json}
        lines = commands.model_shape(options.model, sizes, **how)
    else:
        lines = commands.bench_shape(
            (options.n, options.k, options.d),
            dtype=options.dtype,
            data=options.data,
            device=options.device,
            threads=options.threads,
            json_path=options.json,
        )
    print("\n".join(lines))
    return 0
