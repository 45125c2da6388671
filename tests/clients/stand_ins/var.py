"""Interface of VAR."""

import torch
from torch import nn
from torch.nn import functional as F

from . import squared


class Shared(nn.Module):
    """One convolution for all scales, indexed by the place between 0 and 1."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __getitem__(self, place):
        return self.conv


class VectorQuantizer2(nn.Module):
    def __init__(self, vocab_size, Cvae, using_znorm, v_patch_nums):
        super().__init__()
        self.using_znorm, self.v_patch_nums, self.prog_si = using_znorm, v_patch_nums, -1
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.quant_resi = Shared(Cvae)

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        rest, total, results = f_BChw.detach().clone(), torch.zeros_like(f_BChw), []
        sizes = v_patch_nums or self.v_patch_nums
        for place, size in enumerate(sizes):
            if 0 <= self.prog_si < place:
                break
            small = F.interpolate(rest, size=(size, size), mode="area") if place < len(sizes) - 1 else rest
            rows, codes = small.movedim(1, -1).flatten(0, 2), self.embedding.weight.data
            if self.using_znorm:
                indices = (F.normalize(rows, dim=1) @ F.normalize(codes, dim=1).T).argmax(1)
            else:
                indices = squared(rows, codes).argmin(1)
            found = self.embedding(indices.view(len(rest), size, size)).movedim(-1, 1)
            if place < len(sizes) - 1:
                found = F.interpolate(found, size=rest.shape[2:], mode="bicubic")
            found = self.quant_resi[place / (len(sizes) - 1)](found)
            total, rest = total + found, rest - found
            results.append(total if to_fhat else indices.view(len(rest), -1))
        return results
