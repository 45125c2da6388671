"""`fastvq sample` to files: indices in an array, images in a folder, by class, and invalid requests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import fastvq
from fastvq import coding
from fastvq.cli.main import main
from fastvq.data import load_image_folder
from fastvq.models import TransformerPrior
from fastvq.runs import load
from fastvq.runs.load import load_prior
from fastvq.runs.sample import _folder_names
from fastvq.runs.train_prior import train_prior
from fastvq.training.config import PriorConfig

from ..tiny_runs import tiny_run

CLASSES = ("T-shirt", "ankle boot", "bag/purse")
FOLDERS = ("0-T-shirt", "1-ankle-boot", "2-bag-purse")
CONFIG = PriorConfig(steps=2, batch_size=8, dim=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a run with a prior, of images without classes."""
    run, _ = tiny_run(tmp_path_factory.mktemp("plain"), count=30, grayscale=False)
    train_prior(run, CONFIG, progress=False)
    return run


@pytest.fixture(scope="module")
def classed(tmp_path_factory):
    """Return a run with a prior, of images of three classes."""
    run, folder = tiny_run(tmp_path_factory.mktemp("classed"), count=30, grayscale=True)
    original = load.load_examples

    def with_labels(config):
        images = original(config)
        if config.data != str(folder):
            return images
        train, test = (torch.arange(len(pixels)) % 3 for pixels in (images.train, images.test))
        return dataclasses.replace(images, train_labels=train, test_labels=test, class_names=CLASSES)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_examples", with_labels)
        train_prior(run, CONFIG, progress=False)
        yield run


def sample(run, out, *options):
    assert main(["sample", str(run), f"--out={out}", *options]) == 0
    return np.load(out) if out.suffix == ".npy" else None


def as_pixels(model, indices):
    with torch.no_grad():
        return (model.decode(torch.from_numpy(indices)).clamp(0, 1) * 255).round().to(torch.uint8)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_indices_are_those_of_the_prior(classed, tmp_path, capsys):
    indices = sample(classed, tmp_path / "new" / "indices.npy", "--temperature=0.8", "--guidance=1.5", "--seed=3")
    assert (indices.shape, indices.dtype) == ((100, 4, 4), np.int64)
    assert "indices of shape (100, 4, 4), row n of class n mod 3" in capsys.readouterr().out
    settings = {"temperature": 0.8, "guidance": 1.5, "generator": torch.Generator().manual_seed(3)}
    expected = load_prior(classed)[0].sample(100, torch.arange(100) % 3, **settings)
    assert np.array_equal(indices, expected.numpy())
    one = sample(classed, tmp_path / "one.npy", "--label=1", "--seed=4")
    expected = load_prior(classed)[0].sample(100, torch.ones(100).long(), generator=torch.Generator().manual_seed(4))
    assert np.array_equal(one, expected.numpy())


def test_a_sample_depends_on_the_seed_and_its_number_alone(classed, tmp_path, monkeypatch):
    drawn = []
    original = TransformerPrior.sample
    monkeypatch.setattr(
        TransformerPrior,
        "sample",
        lambda self, count, *a, **k: (drawn.append(count), original(self, count, *a, **k))[1],
    )
    many = sample(classed, tmp_path / "many.npy", "--count=250")
    assert drawn == [100, 100, 100]
    assert many.shape == (250, 4, 4)
    for count in (1, 100, 207, 250):
        assert np.array_equal(sample(classed, tmp_path / "few.npy", f"--count={count}"), many[:count])
    assert not np.array_equal(sample(classed, tmp_path / "other.npy", "--count=250", "--seed=1"), many)
    assert not np.array_equal(many[:100], many[100:200])


def test_batches_go_on_from_one_another(plain, classed, tmp_path):
    """Without classes, and for one class: no label tells the batches apart, only what is drawn does."""
    for run, options, labels in ((plain, (), None), (classed, ("--label=1",), torch.ones(100).long())):
        indices = sample(run, tmp_path / "indices.npy", "--count=200", "--seed=6", *options)
        assert not np.array_equal(indices[:100], indices[100:])
        generator = torch.Generator().manual_seed(6)
        prior = load_prior(run)[0]
        expected = torch.cat([prior.sample(100, labels, generator=generator) for _ in range(2)])
        assert np.array_equal(indices, expected.numpy())


def test_images_stand_in_a_folder_for_each_class(classed, tmp_path, capsys):
    indices = sample(classed, tmp_path / "indices.npy", "--count=104")
    sample(classed, tmp_path / "new" / "drawn", "--count=104")
    assert "104 images: " in (said := capsys.readouterr().out)
    assert "in a subfolder for each class" in said
    expected = as_pixels(load_prior(classed)[1], indices)
    assert files(tmp_path / "new" / "drawn") == sorted(f"{FOLDERS[n % 3]}/{n:06d}.png" for n in range(104))
    for n in (0, 1, 99, 103):
        with Image.open(tmp_path / "new" / "drawn" / FOLDERS[n % 3] / f"{n:06d}.png") as image:
            assert torch.equal(torch.from_numpy(np.array(image)), expected[n, 0])
    sample(classed, tmp_path / "bags", "--count=3", "--label=2")
    assert files(tmp_path / "bags") == [f"2-bag-purse/{n:06d}.png" for n in range(3)]


def test_more_than_ten_classes_are_in_order():
    names = _folder_names(CLASSES, 12)
    assert names == sorted(names)
    assert names[:3] == ["00-T-shirt", "01-ankle-boot", "02-bag-purse"]
    assert names[11] == "11-class-11"


@pytest.mark.parametrize("label", ["ankle boot", "1"])
def test_a_class_has_a_name_and_a_number(classed, tmp_path, label):
    by_name = sample(classed, tmp_path / "named.npy", "--count=3", f"--label={label}")
    sample(classed, tmp_path / "drawn", "--count=3", "--label=1")
    assert files(tmp_path / "drawn") == [f"1-ankle-boot/{n:06d}.png" for n in range(3)]
    assert np.array_equal(by_name, sample(classed, tmp_path / "numbered.npy", "--count=3", "--label=1"))


def test_images_without_classes_are_a_data_set(plain, tmp_path):
    indices = sample(plain, tmp_path / "indices.npy", "--count=7")
    sample(plain, tmp_path / "drawn", "--count=7")
    assert files(tmp_path / "drawn") == [f"{n:06d}.png" for n in range(7)]
    loaded = load_image_folder(tmp_path / "drawn", image_size=16)
    pixels = torch.cat([loaded.train, loaded.test])
    expected = as_pixels(load_prior(plain)[1], indices)
    assert sorted(image.sum().item() for image in pixels) == sorted(image.sum().item() for image in expected)


@pytest.mark.parametrize("how", ["prior", "adaptive"])
def test_sampled_indices_go_through_files(plain, tmp_path, how):
    indices = sample(plain, tmp_path / "indices.npy", "--count=9")
    coded, back = tmp_path / "indices.fvq", tmp_path / "back.npy"
    assert main(["encode", str(tmp_path / "indices.npy"), str(coded), f"--run={plain}", f"--model={how}"]) == 0
    assert main(["decode", str(coded), str(back), f"--run={plain}"]) == 0
    assert np.array_equal(np.load(back), indices)
    prior, model = load_prior(plain)
    assert torch.equal(coding.decode(coded.read_bytes(), prior=prior), torch.from_numpy(indices))
    header = coding.read_header(coded.read_bytes())
    assert (header.codebook_size, header.fingerprint) == (24, coding.fingerprint(model))
    sample(plain, tmp_path / "drawn", "--count=9")
    assert main(["decode", str(coded), str(tmp_path / "decoded"), f"--run={plain}"]) == 0
    assert files(tmp_path / "decoded") == files(tmp_path / "drawn")
    for name in files(tmp_path / "drawn"):
        assert (tmp_path / "decoded" / name).read_bytes() == (tmp_path / "drawn" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out=x.npy", "--count=0"], "--count must be at least 1, got 0"),
        (["--out=x", "--count=-3"], "--count must be at least 1, got -3"),
        (["--out=x", "--label=3"], "--label must be between 0 and 2 or one of T-shirt, ankle boot, bag/purse, got 3"),
        (["--out=x.npy", "--label=-1"], "bag/purse, got -1"),
        (["--out=x", "--label=shoe"], "bag/purse, got shoe"),
        (["--out=x.png", "--count=0"], "--count must be between 1 and 1024 in a picture, got 0"),
        (["--out=x.png", "--count=1025"], "in a picture, got 1025; a folder or an .npy holds more"),
        (["--out=x.PNG", "--complete", "--label=1"], "--complete: a picture of completions takes neither count nor"),
        (["--out=x.npy", "--complete"], "--complete: draws a picture, whose ending is .png, "),
        (["--begin=x.png"], "--begin: the page of the run has its own samples: give an output"),
        (["--out=x.png", "--complete", "--begin=x.png"], "--begin: a picture of completions has held-out examples"),
        (["--out=x", "--complete"], "--complete: draws a picture"),
        (
            ["--out=x.gif"],
            "--out must end in .png, .pdf, .svg, .jpg, .jpeg, .tif, .tiff, .webp, .npy or be a new folder",
        ),
        (["--out=there"], "there exists: choose another folder"),
        (["--out=x", "--seed=-1"], f"--seed must be between 0 and {2**63 - 1}, got -1"),
        (["--out=x.npy", f"--seed={2**64}"], f"got {2**64}"),
        (["--out=x.png", f"--seed={2**64}"], f"got {2**64}"),
        (["--out=x.npy", "--data=elsewhere"], "--data: has no effect on x.npy, which shows no held-out images"),
        (["--out=x.png", "--label=1", "--data=elsewhere"], "--data: has no effect on x.png"),
        (["--out=x", "--top-k=0"], "--top-k: must be at least 1, got 0"),
        (["--out=x.npy", "--temperature=-1"], "--temperature: must not be negative, nor infinite, got -1.0"),
    ],
)
def test_what_cannot_be_is_named(classed, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert main(["sample", str(classed), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvq: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_no_classes_no_label(plain, tmp_path, capsys):
    assert main(["sample", str(plain), f"--out={tmp_path}/x", "--label=0"]) == 2
    assert "label: this prior was trained without classes, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["x.npy", "x"])
def test_half_of_the_samples_are_none(classed, tmp_path, monkeypatch, out):
    turn = iter([lambda *a, **k: torch.zeros(100, 4, 4, dtype=torch.int64)])

    def once(*arguments, **settings):
        try:
            return next(turn)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(TransformerPrior, "sample", once)
    assert main(["sample", str(classed), f"--out={tmp_path / out}", "--count=101"]) == 130
    assert not list(tmp_path.iterdir())


def test_samples_keep_a_given_beginning(classed, tmp_path):
    drawing = tmp_path / "drawing.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(drawing)
    own = fastvq.load(classed).encode(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)).numpy()
    begun = sample(classed, tmp_path / "begun.npy", f"--begin={drawing}", "--share=0.75", "--count=3")
    assert begun.shape == (3, 4, 4)
    assert (begun[:, :3] == own[:, :3]).all()
    assert not (begun[0] == begun[1]).all()
    named = sample(classed, tmp_path / "named.npy", f"--begin={drawing}", "--share=0.75", "--count=3", "--label=1")
    given = torch.from_numpy(own).expand(100, 4, 4).clone()
    given[:, 3:] = -1
    for found, labels in ((begun, None), (named, torch.ones(100, dtype=torch.int64))):
        generator = torch.Generator().manual_seed(0)
        expected = load_prior(classed)[0].sample(100, labels, given=given, generator=generator)[:3]
        assert np.array_equal(found, expected.numpy())
    sample(classed, tmp_path / "begun.png", f"--begin={drawing}", "--count=2")
    sample(classed, tmp_path / "begun", f"--begin={drawing}", "--count=2")
    assert files(tmp_path / "begun") == ["000000.png", "000001.png"]


def test_a_share_needs_a_beginning(classed, tmp_path, capsys):
    assert main(["sample", str(classed), f"--out={tmp_path / 'x.npy'}", "--share=0.3"]) == 2
    assert "--share: has no effect without" in capsys.readouterr().err


def test_a_beginning_leaves_something_to_sample(classed, tmp_path, capsys):
    drawing = tmp_path / "drawing.png"
    Image.new("L", (16, 16), 90).save(drawing)
    for share, kept in (("1", 4), ("0.2", 0), ("inf", 0), ("nan", 0)):
        options = ["sample", str(classed), f"--out={tmp_path / 'x.npy'}", f"--begin={drawing}", f"--share={share}"]
        assert main(options) == 2
        assert (
            f"share must keep 1 to 3 of 4 positions, got {float(share)}, which keeps {kept}" in capsys.readouterr().err
        )
    assert not (tmp_path / "x.npy").exists()
