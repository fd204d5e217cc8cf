"""Cross-entropy of a linear layer and its tangent, block by block of the vocabulary."""

import torch
from torch import Tensor

from ttt_kernels.linear_ce import targets
from ttt_kernels.linear_ce.blocks import blocks
from ttt_kernels.linear_ce.reference import compute_dtype, logits_tangent, own_column
from ttt_kernels.matmul import mm


def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    t_x: Tensor | None,
    t_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """nll and its tangent along (t_x, t_weight), where None is zero.

    With l^ = t_x W^T + x t_weight^T the tangent is sum P l^ - l^_t. A block knows only its own log-sum-exp;
    the softmax over those weighs the blocks' means.
    """
    dtype = compute_dtype(x)
    lse, mean, picked, picked_along = [], [], [], []
    for block in blocks(x.shape[0], weight.shape[0]):
        logits = mm(x, weight[block].mT, dtype)
        along = logits_tangent(x, weight, t_x, t_weight, block, dtype)
        lse.append(torch.logsumexp(logits, 1))
        mean.append((torch.softmax(logits, 1) * along).sum(1))
        picked.append(own_column(logits, target - block.start))
        picked_along.append(own_column(along, target - block.start))
    shares = torch.stack(lse)
    nll = torch.logsumexp(shares, 0) - torch.stack(picked).sum(0)
    tangent = (torch.softmax(shares, 0) * torch.stack(mean)).sum(0) - torch.stack(picked_along).sum(0)
    classes = weight.shape[0]
    return (
        targets.losses(nll, target, classes, ignore_index),
        targets.losses(tangent, target, classes, ignore_index),
    )
