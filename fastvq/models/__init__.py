"""Models built around a quantizer: convolutional encoders and decoders, the VQ-VAE, and a prior over its indices.

x -- Encoder --> features -- bottleneck --> codes -- Decoder --> reconstruction
                                 '-- indices, the compressed form of x -- Prior --> bits, new indices
"""

from __future__ import annotations

from .conv import Decoder, Encoder, ResidualBlock
from .priors import LSTMPrior, PixelCNNPrior, Prior, TransformerPrior
from .video import VideoDecoder, VideoEncoder
from .vqvae import VQVAE, Bottleneck, NoBottleneck, VQVAEOutput

__all__ = [
    "VQVAE",
    "Bottleneck",
    "Decoder",
    "Encoder",
    "LSTMPrior",
    "NoBottleneck",
    "PixelCNNPrior",
    "Prior",
    "ResidualBlock",
    "TransformerPrior",
    "VQVAEOutput",
    "VideoDecoder",
    "VideoEncoder",
]
