"""Layers of fastvq with the codebooks of other projects' checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq.parts.factorized import FactorizedStage
from fastvq.quantizers import FactorizedResidualVQ, ResidualVQ, SplitResidualVQ, StridedResidualVQ, VectorQuantize
from fastvq.quantizers.factorized_stack import FactorizedStack

State = Mapping[str, Tensor]


def from_encodec(state_dict: State, *, prefix: str = "", **settings: Any) -> ResidualVQ:
    """Return a residual quantizer with the codebooks and averages of EnCodec, of a project with its code, or of moshi.

    Args:
        state_dict: of a model or of its quantizer; encodec's own names, or those of transformers.
        prefix: the beginning of the names of the stack, where the model has several.
        settings: arguments of `ResidualVQ`. The defaults are those that learn as EnCodec does: decay=0.99,
            rotation_trick=False, quant_grad_frac=1.0, or for moshi gradient="once"; and channel_last=False, vectors
            (B, D, T).

    Raises:
        ValueError: the state has no such codebooks, several stacks of them, or projections within stages.
    """
    stack = _stack("from_encodec", state_dict, prefix)
    is_moshi = any(name.endswith(".embedding_sum") for name in state_dict)
    defaults = _AS_MOSHI if is_moshi else _AS_ENCODEC
    layer = ResidualVQ(num_quantizers=len(stack.stages), **stack.sizes, **{**defaults, **settings})
    stack.load(layer)
    return layer


def from_mimi(state_dict: State, *, prefix: str = "", **settings: Any) -> SplitResidualVQ:
    """Return the semantic and acoustic quantizer of Mimi, with its projections.

    Args:
        state_dict: of a model or of its quantizer; of transformers, or of moshi.
        prefix: the beginning of the names of the quantizer, where the model has several.
        settings: arguments of `SplitResidualVQ`. The defaults are those that learn as moshi does: decay=0.99,
            rotation_trick=False, gradient="once"; and channel_last=False, vectors (B, D, T).

    Raises:
        ValueError: the state has no such codebooks.
    """
    _check_state(state_dict)
    first, rest = _beginnings(state_dict, prefix, ("semantic_residual_vector_quantizer", "acoustic_residual_vector"))
    if first is None or rest is None:
        first, rest = _beginnings(state_dict, prefix, ("rvq_first", "rvq_rest"))
    if first is None or rest is None:
        raise ValueError(
            "state_dict: must have the codebooks of Mimi, semantic_residual_vector_quantizer and"
            f" acoustic_residual_vector_quantizer, or rvq_first and rvq_rest, got {_some(state_dict)}"
        )
    semantic, acoustic = (_stack("from_mimi", state_dict, beginning) for beginning in (first, rest))
    layer = SplitResidualVQ(
        **semantic.sizes,
        num_semantic=len(semantic.stages),
        num_quantizers=len(semantic.stages) + len(acoustic.stages),
        **{**_AS_MOSHI, **settings},
    )
    semantic.load(layer.semantic)
    acoustic.load(layer.acoustic)
    return layer


def from_dac(state_dict: State, *, prefix: str = "", **settings: Any) -> FactorizedResidualVQ:
    """Return the residual quantizer of DAC with its projections and codebooks.

    Args:
        state_dict: of a model or of its quantizer; of descript-audio-codec, or of transformers. The projections may
            have a weight norm: their product is loaded, which learns as weights without a norm do.
        prefix: the beginning of the names of the stack, up to `quantizers`, where the model has several.
        settings: arguments of `FactorizedResidualVQ`. The default is channel_first=True, vectors (B, D, T).

    Raises:
        ValueError: the state has no such stages, or several stacks of them.
    """
    stages = _factorized_stages("from_dac", state_dict, prefix)
    size = len(stages[0].codes)
    dims = [stage.codes.shape[1] for stage in stages]
    defaults = {"channel_first": True}
    layer = FactorizedResidualVQ(len(stages[0].back), size, len(stages), dims, **{**defaults, **settings})
    _load_factorized(layer, stages)
    return layer


def from_snac(
    state_dict: State, *, strides: Sequence[int] | None = None, prefix: str = "", **settings: Any
) -> StridedResidualVQ:
    """Return the residual quantizer of SNAC with its projections and codebooks.

    Args:
        state_dict: of a model or of its quantizer.
        strides: of the stages, which the state doesn't have. By default they halve from stage to stage down to 1, as in
            the published models: 4, 2, 1 for three stages.
        prefix: the beginning of the names of the stack, up to `quantizers`, where the model has several.
        settings: arguments of `StridedResidualVQ`. The default is channel_first=True, vectors (B, D, T).

    Raises:
        ValueError: the state has no such stages, several stacks of them, or another number of stages than strides.
    """
    stages = _factorized_stages("from_snac", state_dict, prefix)
    if strides is None:
        strides = [2**place for place in reversed(range(len(stages)))]
    if len(strides) != len(stages):
        raise ValueError(f"strides: must be {len(stages)}, one for each stage, got {tuple(strides)}")
    size, dim = stages[0].codes.shape
    defaults = {"channel_first": True}
    layer = StridedResidualVQ(len(stages[0].back), size, strides, dim, **{**defaults, **settings})
    _load_factorized(layer, stages)
    return layer


def from_vqgan(state_dict: State, *, prefix: str = "", cosine: bool = False, **settings: Any) -> VectorQuantize:
    """Return a quantizer with the table of a VQGAN: taming-transformers, diffusers, LlamaGen, Janus.

    Args:
        state_dict: of a model or of its quantizer, with one `embedding.weight`.
        prefix: the beginning of the table's name, where the model has several tables.
        cosine: compare directions, as LlamaGen does. The codes are unit vectors then, and don't learn.
        settings: arguments of `VectorQuantize`. The defaults are accept_image_fmap=True, vectors (B, D, H, W), and,
            unless cosine, learnable_codebook=True, ema_update=False, rotation_trick=False.

    Raises:
        ValueError: the state has no such table, or several of them.
    """
    _check_state(state_dict)
    names = [name for name in state_dict if name.startswith(prefix) and name.endswith("embedding.weight")]
    if len(names) != 1:
        found = f"{len(names)}: {', '.join(names)}; choose by prefix" if names else f"none in {_some(state_dict)}"
        raise ValueError(f"state_dict: must have one embedding.weight, got {found}")
    codes = _table(state_dict, names[0])
    if cosine:
        codes = torch.nn.functional.normalize(codes, dim=-1)
        own = {"use_cosine_sim": True, "freeze_codebook": True}
    else:
        own = {"learnable_codebook": True, "ema_update": False}
    defaults = {**own, "accept_image_fmap": True, "rotation_trick": False}
    layer = VectorQuantize(codes.shape[1], codes.shape[0], **{**defaults, **settings})
    _load(layer, {"_codebook": (codes, torch.ones(len(codes)), codes)})
    return layer


class _Stack(NamedTuple):
    """Codebooks and projections of a residual quantizer."""

    stages: list[tuple[Tensor, Tensor, Tensor]]  # codes, cluster sizes and averages
    into: Tensor | None
    back: Tensor | None

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes among the arguments of `ResidualVQ`."""
        codebook_size, codebook_dim = self.stages[0][0].shape
        dim = codebook_dim if self.into is None else self.into.shape[1]
        return {"dim": dim, "codebook_dim": codebook_dim, "codebook_size": codebook_size}

    def load(self, layer: ResidualVQ) -> None:
        """Load codebooks and projections."""
        codebooks = {f"layers.{place}._codebook": stage for place, stage in enumerate(self.stages)}
        _load(layer, codebooks, self.into, self.back)


def _stack(caller: str, state_dict: State, prefix: str) -> _Stack:
    stages, beginning = _stages(caller, state_dict, prefix)
    into, back = (_projection(state_dict, beginning, name) for name in ("input_proj.weight", "output_proj.weight"))
    return _Stack(stages, into, back)


def _factorized_stages(caller: str, state_dict: State, prefix: str) -> list[FactorizedStage]:
    """Return the weights of each stage of DAC or SNAC."""
    _check_state(state_dict)
    needs = f"{caller} needs the stages of one quantizer, quantizers.0.codebook ..."
    name, places = _one_stack(state_dict, prefix, _FACTORIZED, needs)
    beginnings = [f"{name}quantizers.{place}." for place in range(places)]
    return [
        FactorizedStage(
            *_convolution(state_dict, f"{one}in_proj"),
            *_convolution(state_dict, f"{one}out_proj"),
            _table(state_dict, f"{one}codebook.weight"),
        )
        for one in beginnings
    ]


def _one_stack(state_dict: State, prefix: str, names: re.Pattern[str], needs: str) -> tuple[str, int]:
    """Return the beginning of the names of the only stack, and its number of stages.

    A stage counts if the state has any tensor of it, so that one that lacks others is an error, not a shorter stack.
    """
    stacks: dict[str, set[int]] = {}
    for name in state_dict:
        found = names.fullmatch(name)
        if found and name.startswith(prefix):
            stacks.setdefault(found["beginning"], set()).add(int(found["stage"]))
    if len(stacks) != 1:
        got = f"{len(stacks)}: {', '.join(sorted(stacks))}; choose by prefix" if stacks else _some(state_dict)
        raise ValueError(f"state_dict: {needs}, got {got}")
    [(beginning, places)] = stacks.items()
    if len(places) <= max(places):
        given = ", ".join(map(str, sorted(places)))
        raise ValueError(f"state_dict: must have stages 0 to {max(places)} of {beginning or 'the stack'}, got {given}")
    return beginning, len(places)


def _convolution(state_dict: State, name: str) -> tuple[Tensor, Tensor]:
    """Return the weight (out, in) and the bias of a convolution of width 1, with or without a weight norm."""
    weight = state_dict.get(f"{name}.weight")
    if weight is None:
        norm = _first(state_dict, f"{name}.weight_g", f"{name}.parametrizations.weight.original0")
        direction = _first(state_dict, f"{name}.weight_v", f"{name}.parametrizations.weight.original1")
        weight = direction * (norm / torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True))
    return weight.squeeze(-1).float(), _first(state_dict, f"{name}.bias").float()


@torch.no_grad()
def _load_factorized(layer: FactorizedStack, stages: list[FactorizedStage]) -> None:
    state = layer.state_dict()
    names = ("project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias", "embed")
    for place, stage in enumerate(stages):
        state.update({f"layers.{place}.{name}": tensor for name, tensor in zip(names, stage, strict=True)})
    layer.load_state_dict(state)


def _load(
    layer: ResidualVQ | VectorQuantize,
    codebooks: dict[str, tuple[Tensor, Tensor, Tensor]],
    into: Tensor | None = None,
    back: Tensor | None = None,
) -> None:
    """Load (codes, cluster sizes, averages) of each codebook, and projections without bias."""
    if (into is None) != (back is None) or (into is not None and into.shape[0] == into.shape[1]):
        raise ValueError("state_dict: must have input_proj and output_proj between different dimensions, or neither")
    state = layer.state_dict()
    for name, tensors in codebooks.items():
        for key, tensor in zip(("embed", "cluster_size", "embed_avg"), tensors, strict=True):
            state[f"{name}.{key}"] = tensor[None]
        state[f"{name}.initted"] = torch.ones_like(state[f"{name}.initted"])
    for key, weight in (("project_in", into), ("project_out", back)):
        if weight is not None:
            state[f"{key}.weight"] = weight
            state[f"{key}.bias"] = torch.zeros_like(state[f"{key}.bias"])
    layer.load_state_dict(state)


def _stages(caller: str, state_dict: State, prefix: str) -> tuple[list[tuple[Tensor, Tensor, Tensor]], str]:
    """Return (codes, cluster sizes, averages) of each stage, and the beginning of their names up to `layers`."""
    _check_state(state_dict)
    needs = f"{caller} needs the codebooks of one residual quantizer"
    beginning, places = _one_stack(state_dict, prefix, _STAGE, needs)
    projected = [name for name in state_dict if name.startswith(f"{beginning}layers.") and ".project_in." in name]
    if projected:
        raise ValueError(f"state_dict: must have no projections within stages, got {projected[0]}")
    word = "_codebook" if any(f"{beginning}layers.0._codebook." in name for name in state_dict) else "codebook"
    return [_codebook(state_dict, f"{beginning}layers.{place}.{word}") for place in range(places)], beginning


def _codebook(state_dict: State, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, cluster sizes, averages) of one stage; Mimi and moshi keep no codes."""
    sizes = _first(state_dict, f"{name}.cluster_size", f"{name}.cluster_usage")
    sums = _first(state_dict, f"{name}.embed_avg", f"{name}.embed_sum", f"{name}.embedding_sum")
    codes = _first(state_dict, f"{name}.embed") if f"{name}.embed_avg" in state_dict else None
    shapes = [tuple(tensor.shape) for tensor in (sums if codes is None else codes, sums, sizes)]
    if len(shapes[0]) != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]]:
        got = ", ".join(map(str, shapes))
        raise ValueError(f"state_dict: {name} must have codes and averages (K, D) and sizes (K,), got {got}")
    if codes is None:
        codes = sums / sizes.clamp(min=_MIMI_EPS)[:, None]
    return codes.float(), sizes.float(), sums.float()


def _projection(state_dict: State, beginning: str, key: str) -> Tensor | None:
    """Return the weight (out, in) of a convolution of width 1 beside the stages, or None."""
    weight = state_dict.get(beginning.removesuffix("vq.") + key)
    return None if weight is None else weight.squeeze(-1).float()


def _beginnings(state_dict: State, prefix: str, words: tuple[str, str]) -> list[str | None]:
    """Return the beginnings of names, each up to the end of the part that has a word."""
    found: list[str | None] = []
    for word in words:
        name = next((one for one in state_dict if one.startswith(prefix) and word in one), None)
        end = None if name is None else name.index(".", name.index(word)) + 1
        found.append(None if name is None else name[:end])
    return found


def _check_state(state_dict: object) -> None:
    if isinstance(state_dict, Mapping):
        return
    hint = ": pass its state_dict()" if isinstance(state_dict, nn.Module) else ""
    raise TypeError(f"state_dict: must be a mapping of names to tensors, got {type(state_dict).__name__}{hint}")


def _table(state_dict: State, name: str) -> Tensor:
    """Return a codebook (K, D)."""
    codes = _first(state_dict, name)
    if codes.dim() != 2:
        raise ValueError(f"state_dict: {name} must have shape (K, D), got {tuple(codes.shape)}")
    return codes.detach().float()


def _first(state_dict: State, *names: str) -> Tensor:
    for name in names:
        if name in state_dict:
            return state_dict[name]
    one_of = "one of " if len(names) > 1 else ""
    raise ValueError(f"state_dict: must have {one_of}{', '.join(names)}")


def _some(state_dict: State) -> str:
    names = list(state_dict)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


_STAGE = re.compile(
    r"(?P<beginning>(?:.*\.)?)layers\.(?P<stage>\d+)\._?codebook\."
    r"(?:embed|embed_avg|embed_sum|embedding_sum|cluster_size|cluster_usage|inited|initialized|_initialized)"
)
_FACTORIZED = re.compile(
    r"(?P<beginning>(?:.*\.)?)quantizers\.(?P<stage>\d+)\.(?:codebook\.weight|(?:in|out)_proj\..*)"
)
_MIMI_EPS = 1e-5
_AS_ENCODEC: dict[str, Any] = {"decay": 0.99, "rotation_trick": False, "quant_grad_frac": 1.0, "channel_last": False}
"""Settings of `ResidualVQ` that learn as EnCodec does."""
_AS_MOSHI: dict[str, Any] = {"decay": 0.99, "rotation_trick": False, "gradient": "once", "channel_last": False}
"""Settings of `ResidualVQ` that learn as moshi does."""
