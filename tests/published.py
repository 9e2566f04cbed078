"""The published classes, written only from the model card's description; the tests check ours against them."""

import torch
from torch import nn


class Published(nn.Module):
    """State dict: b_pre, encoder.weight, encoder.bias, decoder.weight, decoder.bias."""

    def __init__(self, d_in, d_sae, k=0, threshold=0.0):
        super().__init__()
        self.b_pre = nn.Parameter(torch.zeros(d_in))
        self.encoder = nn.Linear(d_in, d_sae)
        self.decoder = nn.Linear(d_sae, d_in)
        self.k, self.threshold = k, threshold

    def encode(self, x):
        return self.keep(self.encoder(x - self.b_pre))

    def forward(self, x):
        return self.decoder(self.encode(x)) + self.b_pre


class TopK(Published):
    def keep(self, pre):
        values, indices = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())


class BatchTopK(Published):
    def keep(self, pre):
        flat = pre.flatten()
        values, indices = flat.topk(int(len(pre) * self.k))
        return torch.zeros_like(flat).scatter(0, indices, values.relu()).view_as(pre)


class JumpReLU(Published):
    def keep(self, pre):
        return pre * (pre > self.threshold)


CLASSES = {"TopK": TopK, "BatchTopK": BatchTopK, "JumpReLU": JumpReLU}
