"""Every quantizer as the bottleneck of a VQ-VAE: names, options, layouts and decoding."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastvq
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.modalities.train_config import _NO_BOTTLENECKS, BOTTLENECKS
from fastvq.models import VQVAE, Decoder, Encoder
from fastvq.models.adapters import UNSUITABLE, adapter_of
from fastvq.models.bottlenecks import KINDS, SHARED, build_bottleneck, parse_options

GRID = (3, 4)
SMALL = {"codebook_size": 16}
OPTIONS = {
    "vq": {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 3},
    "rvq": {"codebook_sizes": [16, 8, 4]},
    "grouped-rvq": {"groups": 2, "num_quantizers": 3},
    "residual-sim-vq": {"num_quantizers": 2},
    "fsq": {"levels": [5, 4, 3], "num_codebooks": 2},
    "residual-fsq": {"levels": [4, 3], "num_quantizers": 2},
    "grouped-residual-fsq": {"levels": [4, 3]},
    "lfq": {"num_codebooks": 2},
    "latent": {"levels": [4, 3]},
    "fsp": {"levels": [4, 3]},
    "hierarchical": {"shared_codebook": False},
    "ifsq": {"levels": [5, 3]},
    "gsq": {"groups": 3},
    "factorized": {"codebook_dim": 3},
    "factorized-rvq": {"codebook_dim": 3, "num_quantizers": 3},
    "split-rvq": {"num_quantizers": 3, "num_semantic": 2},
    "gumbel": {"logits": "distance", "hard": True},
}
"""Options by which each kind returns several indices, or indices of another size than by default."""
SIZES = {
    "vq": (16, 16), "rvq": (16, 8, 4), "grouped-rvq": (16,) * 6, "sim-vq": 16, "residual-sim-vq": (16, 16),
    "fsq": (60, 60), "residual-fsq": (12, 12), "grouped-residual-fsq": (12,) * 4, "lfq": (16, 16),
    "residual-lfq": (16,) * 4, "grouped-residual-lfq": (16,) * 4, "fsp": 12, "latent": 12, "hierarchical": 16,
    "ifsq": 15, "ibq": 16, "llamagen": 16, "gumbel": 16,
    "gsq": (16,) * 3, "factorized": 16, "factorized-rvq": (16,) * 3, "split-rvq": (16,) * 3, "sq-vae": 16,
}  # fmt: skip
QUANTIZERS = [name for name in KINDS if name not in ("vae", "none")]


def small(name, **options):
    """Return a small quantizer of a kind for features of dimension 6."""
    torch.manual_seed(0)
    shared = SMALL if "codebook_size" in KINDS[name].settings else {}
    return build_bottleneck(name, 6, GRID, shared, options)


def test_the_names_and_defaults_are_those_of_the_settings():
    assert tuple(KINDS) == BOTTLENECKS
    assert {name: getattr(ImageConfig(), name) for name in SHARED} == SHARED
    assert len(_NO_BOTTLENECKS) == len(UNSUITABLE)


def test_every_quantizer_of_the_package_is_a_bottleneck_or_refused():
    quantizers = {getattr(fastvq.quantizers, name) for name in fastvq.quantizers.__all__}
    assert quantizers <= {kind.quantizer for kind in KINDS.values()} | set(UNSUITABLE)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_indices_decode_to_the_codes(name):
    quantizer = small(name, **OPTIONS.get(name, {}))
    adapter = adapter_of(quantizer)
    z = torch.randn(5, 6, *GRID)
    codes, indices, loss = adapter.quantize(z)
    assert loss.shape == ()
    quantizer.eval()
    codes, indices, loss = adapter.quantize(z)
    assert (codes.shape, loss.shape) == (z.shape, ())
    assert adapter.codebook_size == SIZES[name]
    assert indices.shape[1:] == adapter.index_shape(GRID)
    assert torch.equal(adapter.codes(indices.long(), 2), codes)
    stages = adapter.stages(indices)
    assert all(int(stage.max()) < size for stage, size in zip(stages, adapter.stage_sizes(), strict=True))
    assert sum(stage[0].numel() for stage in stages) == indices[0].numel()
    vectors = adapter.code_vectors()
    vectors = () if vectors is None else vectors if isinstance(vectors, tuple) else (vectors,)
    assert [len(v) for v in vectors] in ([], [*adapter.stage_sizes()][: len(vectors)])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_model_encodes_and_decodes_with_each(name):
    torch.manual_seed(0)
    sizes = {"width": 4, "residual_width": 2, "residual_blocks": 0}
    model = VQVAE(Encoder(1, 6, **sizes), small(name, **OPTIONS.get(name, {})), Decoder(6, 1, **sizes))
    x = torch.randn(3, 1, 12, 16)
    output = model(x)
    ((output.reconstruction - x).square().mean() + output.loss).backward()
    model.eval()
    indices = model.encode(x)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(model.decode(indices), model(x).reconstruction)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_option_takes_the_default_of_its_class(name):
    kind = KINDS[name]
    options = kind.options()
    assert not {"dim", "channel_last", "settings"} & set(options)
    defaults = {}
    for owner in (kind.quantizer, *kind.passes_to):
        for option, parameter in inspect.signature(owner).parameters.items():
            if option in options and parameter.default is not parameter.empty:
                defaults.setdefault(option, parameter.default)
    small(name, **{k: v for k, v in defaults.items() if k not in kind.defaults})


@pytest.mark.parametrize("quantizer", UNSUITABLE, ids=lambda quantizer: quantizer.__name__)
def test_quantizers_without_codes_are_refused_by_name(quantizer):
    bare = quantizer.__new__(quantizer)
    with pytest.raises(TypeError, match=f"^{quantizer.__name__} cannot be the bottleneck of a VQVAE: it "):
        adapter_of(bare)


@pytest.mark.parametrize(
    ("name", "option", "text", "value"),
    [
        ("rvq", "num_quantizers", "8", 8),
        ("rvq", "shared_codebook", "true", True),
        ("rvq", "beam_size", "none", None),
        ("rvq", "codebook_sizes", "16,8", [16, 8]),
        ("vq", "eps", "1e-3", 1e-3),
        ("vq", "kmeans_seeding", "random", "random"),
        ("fsq", "levels", "8,5,5", [8, 5, 5]),
        ("latent", "levels", "8", 8),
        ("latent", "levels", "8,5", [8, 5]),
        ("hierarchical", "scales", "1,2,4", [1, 2, 4]),
        ("gumbel", "final_temperature", "0.5", 0.5),
        ("residual-fsq", "soft_clamp_input_value", "1.5,2", [1.5, 2.0]),
    ],
)
def test_texts_are_read_as_the_type_of_the_argument(name, option, text, value):
    for given in (text, value):
        parsed = parse_options(name, {option: given})
        assert parsed == {option: value}
        assert type(parsed[option]) is type(value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rvq", {"num_quantizers": "8.5"}, "num_quantizers must be an integer or none, got '8.5'"),
        ("rvq", {"shared_codebook": 1}, "shared_codebook must be true or false, got 1"),
        ("vq", {"eps": "nan"}, "eps must be a number, got 'nan'"),
        ("fsq", {"levels": "8,x"}, "levels must be numbers separated by commas, got '8,x'"),
        ("fsq", {"level": "8"}, "level is no option of the bottleneck fsq: its options are bound_hard_clamp, "),
        ("rvq", {"num_quantizers": 0}, "num_quantizers: must be an integer of at least 1, got 0"),
        ("rvq", {"codebook_sizes": [4, 0]}, "codebook_size: must be an integer of at least 1, got 0"),
        ("grouped-rvq", {"groups": 4}, "groups: must divide dim=6, got 4"),
        ("fsq", {"levels": [2]}, "levels: .*got"),
        ("vq", {"heads": 0}, "heads: must be an integer of at least 1, got 0"),
        ("hierarchical", {"scales": [1, 2]}, "scales: must end with the grid of the features, 3x4, got"),
        ("fsp", {"act_name": "relu"}, "act_name: .*'relu'"),
        (
            "fsq",
            {"levels": [64] * 5},
            "the bottleneck fsq would have 1073741824 codes, of which a run",
        ),
    ],
)
def test_an_invalid_option_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        small(name, **options)


def test_errors_name_settings_as_settings():
    with pytest.raises(ConfigError, match=r"^dead_code_threshold: must be positive beside"):
        build_bottleneck("vq", 6, GRID, {"dead_code_threshold": 0.0}, {"directional_reparam": True})


@pytest.mark.parametrize(("name", "setting", "value"), [("fsq", "decay", 0.9), ("sim-vq", "dead_code_threshold", 2.0)])
def test_a_setting_without_effect_is_refused(name, setting, value):
    with pytest.raises(
        ConfigError, match=f"^{setting} has no effect on the bottleneck {name}, got {value}: its options"
    ):
        build_bottleneck(name, 6, GRID, {setting: value}, {})


def test_the_size_of_an_unknown_quantizer_is_asked_for():
    with pytest.raises(TypeError, match="Linear has no codebook_size"):
        adapter_of(torch.nn.Linear(2, 2)).codebook_size  # noqa: B018
