"""The kernels run on a GPU where there is one, and else in Triton's interpreter, which tests/conftest.py turns on."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

pytest.importorskip("triton", reason="Triton isn't installed: the kernels can be neither compiled nor interpreted")

import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PatchedOnce:
    """Triton's functions replaced by those of its interpreter, once for a launch.

    The interpreter itself goes through all members of `triton.language` at each call of a device function, which takes
    longer than the function.
    """

    def __init__(self, patch):
        self.patch = patch
        self.scopes = {}
        self.languages = functools.cache(self.languages)

    def languages(self, fn):
        """Return the modules of which the interpreter patches the members for `fn`."""
        seen = fn.__globals__.values()
        return tuple(name for name, module in (("tl", tl), ("core", tl.core)) if any(v is module for v in seen))

    def __call__(self, fn):
        languages = self.languages(fn)
        if languages not in self.scopes:
            self.scopes[languages] = self.patch(fn)
        return self

    def restore(self):
        while self.scopes:
            self.scopes.popitem()[1].restore()


@pytest.fixture(scope="session", autouse=True)
def _patched_once():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", PatchedOnce(interpreter._patch_lang))
        yield


@pytest.fixture(autouse=True)
def _numpy_warnings():
    """Silence numpy's warnings about infinities, which a GPU does not report."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="numpy")
        yield
