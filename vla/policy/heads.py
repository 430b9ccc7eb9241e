"""What reads a backbone's hidden states, besides its own head: where an episode ends, and actions as numbers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class EndHead(nn.Sequential):
    """(..., d) -> (..., S): the state in which the demonstration ends, in [-1, 1]."""

    def __init__(self, hidden: int, state_dim: int) -> None:
        super().__init__(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, state_dim))


class L1Head(nn.Module):
    """Hidden states of the action positions -> actions in [-1, 1], one step of the chunk at a time.

    OpenVLA-OFT's action head (Kim et al. 2025, `L1RegressionActionHead`, an `MLPResNet` of two blocks): the A hidden states of
    a step are joined to one vector. Names of the parameters are its own, so that its weights can be read.
    """

    def __init__(self, hidden: int, dims: int, width: int | None = None, blocks: int = 2) -> None:
        super().__init__()
        width = width or hidden
        self.dims = dims
        self.model = _MLPResNet(hidden * dims, width, dims, blocks)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, H * A, d) -> (B, H, A), not clipped."""
        B, N, d = hidden.shape
        return self.model(hidden.reshape(B, N // self.dims, self.dims * d))


class _MLPResNet(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)
