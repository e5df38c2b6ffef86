"""What the processes of a group run; other processes can import this file by its name."""

from __future__ import annotations

import torch


def maps(*shape, seed=0, low=1.0, high=60.0):
    """Uniform numbers of a seed, float64."""
    made = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=made, dtype=torch.float64) * (high - low) + low


def pooled_loss(rank, whole=False):
    """The loss of one rank's image, or of both, and its gradients."""
    from gvdepth.losses import depth_loss

    target, depth = maps(2, 1, 3, 4, seed=1), maps(2, 1, 3, 4, seed=2)
    s = maps(2, 1, 3, 4, seed=3, low=-1, high=1)
    mask = maps(2, 1, 3, 4, seed=4) > 15
    mask[1] &= maps(1, 3, 4, seed=5) > 45  # another count on the other rank
    mine = slice(None) if whole else slice(rank, rank + 1)
    depth, s = depth[mine].requires_grad_(), s[mine].requires_grad_()
    loss = depth_loss(depth, target[mine], mask[mine], cues=((depth, s),), across_ranks=True, correction=1)
    loss.total.backward()
    return float(loss.total.detach()), depth.grad.numpy(), s.grad.numpy()
