"""Models built around a quantizer: convolutional encoders and decoders, and the VQ-VAE.

x -- Encoder --> features -- bottleneck --> codes -- Decoder --> reconstruction
                                 '-- indices, the compressed form of x
"""

from __future__ import annotations

from fastvq.models.conv import Decoder, Encoder, ResidualBlock
from fastvq.models.vqvae import VQVAE, Bottleneck, NoBottleneck, VQVAEOutput

__all__ = ["VQVAE", "Bottleneck", "Decoder", "Encoder", "NoBottleneck", "ResidualBlock", "VQVAEOutput"]
