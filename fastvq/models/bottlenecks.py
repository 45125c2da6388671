"""Quantizers by the names of settings, with their options, for VQ-VAEs that are built from settings.

    bottleneck = build_bottleneck("rvq", 64, (7, 7), {"codebook_size": 512}, {"num_quantizers": 8})

The options of a bottleneck are the arguments of its class, and of the classes that it passes arguments on to, whose
values can be written as text: numbers, texts, lists of numbers. Arguments that several quantizers share under different
names, such as the decay of the averages, are settings of their own.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastvq.errors import ConfigError
from fastvq.quantizers import (
    FSP,
    FSQ,
    IBQ,
    IFSQ,
    LFQ,
    FactorizedResidualVQ,
    FactorizedVQ,
    GroupedResidualFSQ,
    GroupedResidualLFQ,
    GroupedResidualVQ,
    GroupedSphericalVQ,
    GumbelQuantize,
    HierarchicalVQ,
    LatentQuantize,
    LlamaGenVQ,
    ResidualFSQ,
    ResidualLFQ,
    ResidualSimVQ,
    ResidualVQ,
    SimVQ,
    SplitResidualVQ,
    StochasticVQ,
    VectorQuantize,
)

from .adapters import adapter_of
from .gaussian import GaussianBottleneck
from .vqvae import Continuous, NoBottleneck

LARGEST_CODEBOOK = 1 << 24
"""Largest number of codes, in all stages together, that indices of a run may have, as in coded files."""
SHARED: dict[str, Any] = {
    "codebook_size": 512,
    "decay": 0.99,
    "commitment_weight": 0.25,
    "dead_code_threshold": 1.0,
    "rotation_trick": False,
}
"""Settings that several quantizers share, with the defaults of `TrainConfig`."""
_LAYOUT = {
    *("dim", "channel_last", "channel_first", "is_channel_first", "accept_image_fmap", "accept_3d_fmap"),
    *("return_indices", "return_zeros_for_masked_padding", "stage_axis"),
}
"""Arguments that follow from the model around a quantizer."""
_UNUSED = {
    *("scale", "force_quantization_f32"),  # without effect in the quantizers themselves
    *("manual_ema_update", "manual_in_place_optimizer_update"),  # a training loop would have to call the update
}
_LEARNED = {
    "decay": "decay",
    "commitment_weight": "commitment_weight",
    "dead_code_threshold": "threshold_ema_dead_code",
    "rotation_trick": "rotation_trick",
}
_VQ = {"codebook_size": "codebook_size", **_LEARNED}
_SIM = {
    "codebook_size": "codebook_size",
    "commitment_weight": "input_to_quantize_commit_loss_weight",
    "rotation_trick": "rotation_trick",
}
_LFQ = {"codebook_size": "codebook_size", "commitment_weight": "commitment_loss_weight"}
_BY_GRADIENT = {name: name for name in ("codebook_size", "commitment_weight")}
_STAGES = {"num_quantizers": 4}
_LEVELS = {"levels": [8, 8, 8]}


@dataclass(frozen=True)
class Kind:
    """A quantizer that settings can name.

    Attributes:
        quantizer: its class.
        passes_to: classes that take the arguments which its class passes on.
        settings: {setting in `SHARED`: argument}.
        defaults: options that the class has no default for, or another one.
        fixed: options that are not offered, since the class sets them itself.
    """

    quantizer: type[nn.Module]
    passes_to: tuple[type[nn.Module], ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def options(self) -> dict[str, Any]:
        """Return {option: type} of the options of this quantizer."""
        found: dict[str, Any] = {}
        for owner in (self.quantizer, *self.passes_to):
            hints = typing.get_type_hints(owner.__init__)
            for name, parameter in inspect.signature(owner).parameters.items():
                if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) or name in found:
                    continue
                if name in {*_LAYOUT, *_UNUSED, *self.fixed, *self.settings.values()} or not _is_text(hints[name]):
                    continue
                found[name] = hints[name]
        if "codebook_size" in self.settings and issubclass(self.quantizer, ResidualVQ | GroupedResidualVQ):
            found["codebook_sizes"] = tuple[int, ...]
        return found


_NO_HEADS = frozenset({"heads", "separate_codebook_per_head"})
_FSQ_STAGE = frozenset({"num_codebooks", "keep_num_codebooks_dim", "preserve_symmetry"})
_LFQ_STAGE = frozenset({"num_codebooks", "keep_num_codebooks_dim", "has_projections", "codebook_scale"})
_SIM_LOSS = frozenset({"commitment_weight"})  # weight of the whole loss, not of the commitment loss as elsewhere
_KMEANS = {"kmeans_init": True}

KINDS: dict[str, Kind] = {
    # k-means starts from random rows, as the runs that the documents show did; dead codes are soon replaced.
    "vq": Kind(VectorQuantize, settings=_VQ, defaults=_KMEANS | {"kmeans_seeding": "random"}),
    "rvq": Kind(ResidualVQ, (VectorQuantize,), _VQ, _STAGES | _KMEANS, _NO_HEADS),
    "grouped-rvq": Kind(
        GroupedResidualVQ, (ResidualVQ, VectorQuantize), _VQ, {"groups": 2, "num_quantizers": 2} | _KMEANS, _NO_HEADS
    ),
    "sim-vq": Kind(SimVQ, settings=_SIM, fixed=_SIM_LOSS),
    "residual-sim-vq": Kind(ResidualSimVQ, (SimVQ,), _SIM, _STAGES, _NO_HEADS | _SIM_LOSS),
    "fsq": Kind(FSQ, defaults=_LEVELS),
    "residual-fsq": Kind(ResidualFSQ, (FSQ,), {}, _LEVELS | _STAGES, _FSQ_STAGE),
    "grouped-residual-fsq": Kind(
        GroupedResidualFSQ, (ResidualFSQ, FSQ), {}, _LEVELS | {"groups": 2, "num_quantizers": 2}, _FSQ_STAGE
    ),
    "lfq": Kind(LFQ, settings=_LFQ),
    "residual-lfq": Kind(ResidualLFQ, (LFQ,), _LFQ, _STAGES, _LFQ_STAGE),
    "grouped-residual-lfq": Kind(
        GroupedResidualLFQ, (ResidualLFQ, LFQ), _LFQ, {"groups": 2, "num_quantizers": 2}, _LFQ_STAGE
    ),
    "ifsq": Kind(IFSQ, (FSQ,), {}, {"levels": [7, 7, 7]}, frozenset({"preserve_symmetry", "bound_hard_clamp"})),
    "fsp": Kind(FSP, defaults=_LEVELS),
    "latent": Kind(LatentQuantize, settings={"commitment_weight": "commitment_loss_weight"}, defaults=_LEVELS),
    "hierarchical": Kind(HierarchicalVQ, settings=_VQ),
    # Its indices in eval are the most probable ones: those of training become them as the temperature falls.
    "ibq": Kind(IBQ, settings={"codebook_size": "codebook_size", "commitment_weight": "beta"}),
    "llamagen": Kind(LlamaGenVQ, settings=_BY_GRADIENT),
    "gsq": Kind(GroupedSphericalVQ, settings=_BY_GRADIENT),
    "factorized": Kind(FactorizedVQ, settings=_BY_GRADIENT),
    "factorized-rvq": Kind(FactorizedResidualVQ, settings=_BY_GRADIENT, defaults=_STAGES),
    "split-rvq": Kind(SplitResidualVQ, (ResidualVQ, VectorQuantize), _VQ, _STAGES | _KMEANS, _NO_HEADS),
    "sq-vae": Kind(StochasticVQ, settings={"codebook_size": "codebook_size"}),
    "gumbel": Kind(GumbelQuantize, settings={"codebook_size": "codebook_size"}, defaults={"final_temperature": 0.0625}),
    "vae": Kind(GaussianBottleneck),
    "none": Kind(NoBottleneck, settings=dict.fromkeys(SHARED, "")),
}
"""Bottlenecks by name."""


def build_bottleneck(
    name: str, dim: int, grid: tuple[int, ...], shared: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Return a new quantizer, its weights drawn from torch's current random state.

    Args:
        name: one of `KINDS`.
        dim: dimension D of the features.
        grid: shape of the grid of features of an image; only "hierarchical", whose scales end with it, depends on it.
        shared: settings in `SHARED`; those left out have their defaults.
        options: options of this kind, see `Kind.options`, as values or as texts.

    Raises:
        ConfigError: an unknown option, an invalid value, or a setting that this quantizer does not have.
    """
    kind = KINDS[name]
    shared = {**SHARED, **shared}
    for setting, value in shared.items():
        if setting not in kind.settings and value != SHARED[setting]:
            raise ConfigError(f"{setting} has no effect on the bottleneck {name}, got {value}: {_listed(name)}")
    options = parse_options(name, options)
    arguments: dict[str, Any] = {
        **kind.defaults,
        **{argument: shared[setting] for setting, argument in kind.settings.items() if argument},
        **{option: _frozen(value) for option, value in options.items()},
    }
    if "codebook_sizes" in arguments:
        arguments["codebook_size"] = arguments.pop("codebook_sizes")
        if "num_quantizers" not in options:
            del arguments["num_quantizers"]
    if name == "hierarchical":
        arguments["accept_image_fmap"] = True
        arguments.setdefault("scales", _doubling(grid))
    try:
        quantizer = kind.quantizer(dim=dim, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{_in_settings(str(error), kind)} (bottleneck {name})") from error
    if isinstance(quantizer, HierarchicalVQ) and quantizer.level_shapes[-1] != tuple(grid):
        raise ConfigError(
            f"scales: must end with the grid of the features, {'x'.join(map(str, grid))}, got {quantizer.scales}"
            f" (bottleneck {name})"
        )
    if isinstance(quantizer, Continuous):
        return quantizer
    codes = sum(adapter_of(quantizer).stage_sizes())
    if codes > LARGEST_CODEBOOK:
        raise ConfigError(f"the bottleneck {name} would have {codes} codes, of which a run may have {LARGEST_CODEBOOK}")
    return quantizer


def parse_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a bottleneck as JSON values of their types, from values or texts.

    Raises:
        ConfigError: this bottleneck has no such option, or a value is of another type.
    """
    known = KINDS[name].options()
    parsed = {}
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"{option} is no option of the bottleneck {name}: {_listed(name)}")
        try:
            parsed[option] = _parsed(value, known[option])
        except ValueError:
            raise ConfigError(
                f"{option} must be {_described(known[option])}, got {value!r} (bottleneck {name})"
            ) from None
    return parsed


def describe_options(name: str) -> list[str]:
    """Return the settings and options of a bottleneck, with types and defaults, as lines to print.

    Raises:
        ConfigError: there is no such bottleneck.
    """
    if name not in KINDS:
        raise ConfigError(f"bottleneck must be one of {', '.join(KINDS)}, got {name!r}")
    kind = KINDS[name]
    settings = [f"--{setting.replace('_', '-')}" for setting, argument in kind.settings.items() if argument]
    lines = [f"{name}: {kind.quantizer.__name__}"]
    lines += [f"settings that it shares with others: {', '.join(settings)}"] if settings else []
    options = kind.options()
    lines += [] if options else ["it has no options"]
    for option, hint in options.items():
        default = kind.defaults.get(option, _default(kind, option))
        text = "" if default is None else f" (default: {_as_text(default)})"
        lines.append(f"  --{option.replace('_', '-'):<36} {_described(hint)}{text}")
    return lines


def _default(kind: Kind, option: str) -> Any:
    """Return the default of an option in the first signature that has it, or None."""
    for owner in (kind.quantizer, *kind.passes_to):
        parameter = inspect.signature(owner).parameters.get(option)
        if parameter is not None:
            return None if parameter.default is parameter.empty else parameter.default
    return None


def _as_text(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_as_text, value)) if isinstance(value, list | tuple) else str(value)


def _listed(name: str) -> str:
    settings = [setting for setting, argument in KINDS[name].settings.items() if argument]
    names = sorted({*settings, *KINDS[name].options()})
    return f"its options are {', '.join(names)}" if names else "it has no options"


def _in_settings(message: str, kind: Kind) -> str:
    """Return a constructor's message with the names of settings in place of its arguments."""
    for setting, argument in kind.settings.items():
        if argument:
            message = re.sub(rf"(?<!\w){argument}(?!\w)", setting, message)
    return message


def _doubling(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return grids that double from one cell to `grid`."""
    scales, size = [], 1
    while size < max(grid):
        scales.append(tuple(min(size, length) for length in grid))
        size *= 2
    return [*scales, tuple(grid)]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


_Text = (bool, int, float, str, type(None))


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _element(hint: Any) -> Any:
    """Return the type of the elements of a sequence, or None for other types."""
    origin = typing.get_origin(hint)
    return typing.get_args(hint)[0] if origin in (Sequence, tuple) else None


def _is_text(hint: Any) -> bool:
    """Return whether a text can express a value of a type other than None."""
    return any(
        member in _Text[:-1] or (_element(member) is not None and _is_text(_element(member)))
        for member in _members(hint)
    )


def _parsed(value: Any, hint: Any) -> Any:
    """Return a value, or the value that a text stands for, as a JSON value of a type.

    Raises:
        ValueError: there is none.
    """
    # Numbers before texts and sequences: "8" is a number where it may be either.
    order = [*(kind for kind in _Text if kind in _members(hint)), *(m for m in _members(hint) if _element(m))]
    for member in order:
        try:
            return _parsed_as(value, member)
        except ValueError:
            continue
    raise ValueError(value)


def _parsed_as(value: Any, member: Any) -> Any:
    inner = _element(member)
    if inner is not None:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise ValueError(value)
        return [_parsed(part, inner) for part in parts]
    text = value.strip().lower() if isinstance(value, str) else None
    if member is type(None) and (value is None or text == "none"):
        return None
    if member is bool and (isinstance(value, bool) or text in ("true", "false")):
        return value if isinstance(value, bool) else text == "true"
    if member is int and (type(value) is int or text is not None):
        return int(value)
    if member is float and (type(value) in (int, float) or text is not None) and math.isfinite(float(value)):
        return float(value)
    if member is str and isinstance(value, str):
        return value
    raise ValueError(value)


def _described(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "none"}
    parts = []
    for member in _members(hint):
        inner = _element(member)
        if inner is not None:
            parts.append("numbers separated by commas")
        elif member in names:
            parts.append(names[member])
    return " or ".join(dict.fromkeys(parts))
