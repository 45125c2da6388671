"""Settings of all tests of clients."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def plain_convolutions():
    """Run convolutions without oneDNN, which compiles code for each shape: most of the time of the small ones here."""
    before, *_ = torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(before)
