"""The kernels run on a GPU where there is one, and else in Triton's interpreter, which tests/conftest.py turns on."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("triton", reason="Triton isn't installed: the kernels can be neither compiled nor interpreted")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _numpy_warnings():
    """Silence numpy's warnings about infinities, which a GPU does not report."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="numpy")
        yield
