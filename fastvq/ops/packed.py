"""Codebooks that a caller keeps packed for the searches of the native CPU backend."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.backends import native
from fastvq.backends import select as backends
from fastvq.backends.support import METRICS

from .checks import check_metric, check_values
from .registry import define


class PackedCodebook:
    """A codebook that is packed once, for many searches among the same codes.

    `search`, `topk_search` and `residual_search` take it in place of the codebook, with the same results. On the CPU
    they otherwise pack the codes at each call, which costs as much as the search of some dozen vectors. Other devices,
    other backends than native and compiled programs have no packed form: there it stands for its tensors.

    A search first compares the tensors with what they were when they were packed: memory, shape, strides, dtype and
    version counter. If one of them has changed, the codes are packed again. The version counter sees all in-place
    operations of torch, on views too, but not a write through `.data`, a NumPy array, DLPack or another process: call
    `repack` after one of these, or searches go on with the codes of before. Layers, whose codes anybody may write to,
    therefore keep no packed codebook.

    It holds the tensors that it was made of, a copy of their values and the packed forms: two of int16, for many rows,
    and one of int8, for a few. That is together 3.25 times the memory of a float32 codebook, and 4.25 times where the
    processor has no instructions for pairs of int16. Metric "dot" and `topk_search` add forms of their own when they
    are first used.
    Threads may share it. Copies and pickles hold the tensors and pack them anew.

    Args:
        codebook: codes (K, D); (H, K, D) for heads; (Q, K, D), or a sequence as `residual_search` takes it, for
            stages.
        metric: "l2" or "dot", the metric to pack for at once. Others are packed for when they are first asked for.

    Raises:
        TypeError, ValueError: the codebook or the metric is invalid, or an inference tensor, which counts no versions;
            the message names the argument.
    """

    def __init__(self, codebook: Tensor | Sequence[Tensor], *, metric: str = "l2") -> None:
        check_metric(metric)
        self.codebook = codebook if isinstance(codebook, Tensor) else list(codebook)
        self.metric = metric
        for tensor in self._tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"codebook: must be a tensor or a sequence of tensors, got {type(tensor).__name__}")
            check_values("codebook", tensor, (2, 3), "(K, D), (H, K, D) or (Q, K, D), or be a sequence of them")
            if tensor.is_inference():
                raise ValueError(
                    "codebook: must count its versions, which a tensor made in inference_mode doesn't: clone it outside"
                )
            if tensor.shape[-2] == 0:
                raise ValueError(f"codebook: must hold at least one code, got shape {tuple(tensor.shape)}")
            first = self._tensors[0]
            if tensor.shape[-1] != first.shape[-1]:
                shapes = f"{tuple(first.shape)} and {tuple(tensor.shape)}"
                raise ValueError(f"codebook: must have one dimension D, got shapes {shapes}")
            if tensor.dtype != first.dtype:
                raise TypeError(f"codebook: must have one dtype, got {first.dtype} and {tensor.dtype}")
        if not any(tensor.numel() for tensor in self._tensors):
            raise ValueError(f"codebook: must hold at least one stage of at least one dimension, got {self}")
        self._changing = threading.Lock()
        self._packed: _Packed | None = None
        if self._tensors[0].is_cpu and native.instruction_set():
            self.repack()

    @property
    def tensor(self) -> Tensor:
        """The codebook as one tensor.

        Raises:
            ValueError: it is a sequence of stages.
        """
        if not isinstance(self.codebook, Tensor):
            raise ValueError(f"codebook: must be packed from one tensor, got {self}, for residual_search")
        return self.codebook

    @property
    def _tensors(self) -> list[Tensor]:
        return [self.codebook] if isinstance(self.codebook, Tensor) else self.codebook

    def repack(self) -> None:
        """Pack the codes as they are now, after a write that no version counter has seen."""
        with self._changing:
            self._packed = _Packed(self._tensors, self.metric)

    def number_for(self, x: Tensor) -> tuple[int, Any] | None:
        """Return the number of the packed form that serves x and what keeps it alive, or None if the tensors serve.

        Codes that have changed are packed again.
        """
        if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or not x.is_cpu:
            return None
        if backends.requested() not in (None, "native") or not native.instruction_set():
            return None
        packed = self._packed
        if packed is None or not packed.is_current(self._tensors):
            with self._changing:
                packed = self._packed
                if packed is None or not packed.is_current(self._tensors):
                    if not all(tensor.is_cpu for tensor in self._tensors):
                        return None
                    packed = self._packed = _Packed(self._tensors, self.metric)
        return packed.number, packed

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCodebook:
        return PackedCodebook(copy.deepcopy(self.codebook, memo), metric=self.metric)

    def __reduce__(self) -> Any:
        return _unpickled, (self.codebook, self.metric)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self._tensors)
        return f"PackedCodebook({shapes})"


def _unpickled(codebook: Tensor | list[Tensor], metric: str) -> PackedCodebook:
    return PackedCodebook(codebook, metric=metric)


class _Packed:
    """A packed form in the native library, and what its tensors were."""

    def __init__(self, tensors: list[Tensor], metric: str) -> None:
        self.state = [_state(tensor) for tensor in tensors]
        # Memory that is still in use is not given to another tensor, so that its address stands for it.
        self.memory = [tensor.detach() for tensor in tensors]
        self.number: int = torch.ops.fastvq.pack(self.memory, METRICS[metric])
        weakref.finalize(self, native.free_packed, self.number).atexit = False

    def is_current(self, tensors: list[Tensor]) -> bool:
        return list(map(_state, tensors)) == self.state


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


define("pack(Tensor[] codebooks, int metric) -> int")
define("packed_search(Tensor x, int packed, int metric=0, Tensor? mask=None) -> Tensor")
define("packed_topk_search(Tensor x, int packed, int k, int metric=0, Tensor? mask=None) -> Tensor")
define("packed_residual_search(Tensor x, int packed, int metric=0, Tensor? mask=None) -> Tensor")

# They have no choice of a backend behind them: `PackedCodebook.number_for` makes it.
packed_search = torch.ops.fastvq.packed_search.default
packed_topk_search = torch.ops.fastvq.packed_topk_search.default
packed_residual_search = torch.ops.fastvq.packed_residual_search.default
