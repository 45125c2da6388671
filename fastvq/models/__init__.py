"""Models built around a quantizer: convolutional encoders and decoders, the VQ-VAE, and a prior over its indices.

x -- Encoder --> features -- bottleneck --> codes -- Decoder --> reconstruction
                                 '-- indices, the compressed form of x -- Prior --> bits, new indices
"""

from __future__ import annotations

from .audio import AudioDecoder, AudioEncoder
from .contrastive import ContrastiveModel
from .conv import Decoder, Encoder, ResidualBlock
from .gaussian import GaussianBottleneck
from .jukebox import JukeboxBottleneck, JukeboxDecoder, JukeboxEncoder
from .likelihood import discretized_logistic, elbo_bits_per_dimension
from .priors import (
    DepthPrior,
    HierarchicalPrior,
    LSTMPrior,
    NextScalePrior,
    PixelCNNPrior,
    Prior,
    TextPrior,
    TransformerPrior,
)
from .streaming import StreamingDecoder, StreamingEncoder
from .text import TextTokenizer
from .transform import TransformDecoder, TransformEncoder
from .video import VideoDecoder, VideoEncoder
from .vqvae import VQVAE, Bottleneck, Continuous, NoBottleneck, VQVAEOutput
from .vqvae2 import GridsBottleneck, halved_grids

__all__ = [
    "VQVAE",
    "AudioDecoder",
    "AudioEncoder",
    "Bottleneck",
    "Continuous",
    "ContrastiveModel",
    "Decoder",
    "DepthPrior",
    "Encoder",
    "GaussianBottleneck",
    "GridsBottleneck",
    "HierarchicalPrior",
    "JukeboxBottleneck",
    "JukeboxDecoder",
    "JukeboxEncoder",
    "LSTMPrior",
    "NextScalePrior",
    "NoBottleneck",
    "PixelCNNPrior",
    "Prior",
    "ResidualBlock",
    "StreamingDecoder",
    "StreamingEncoder",
    "TextPrior",
    "TextTokenizer",
    "TransformDecoder",
    "TransformEncoder",
    "TransformerPrior",
    "VQVAEOutput",
    "VideoDecoder",
    "VideoEncoder",
    "discretized_logistic",
    "elbo_bits_per_dimension",
    "halved_grids",
]
