"""NT-Xent (Chen et al. 2020, eq. 1): the readable reference, the definition for all faster forms."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ntxent(projections: Tensor, temperature: float = 0.1) -> Tensor:
    """Normalised-temperature cross-entropy: each of 2B anchors must pick its other view among 2B - 1.

    Args:
        projections: [2B, d], the first views of B images, then their second views; any float type, any norm
            (a zero vector counts as orthogonal to all).
        temperature: above 0.

    Returns:
        Scalar in fp32 (fp64 for fp64 input), in nats, the mean over the 2B anchors. It certifies at most
        ln(2B - 1) nats of mutual information between the views.

    Raises:
        ValueError: an odd number of vectors, no vectors, or a temperature that is not positive.
    """
    anchors = len(projections)
    if projections.ndim != 2 or anchors < 2 or anchors % 2:
        raise ValueError(f"projections must be [2B, d] with B >= 1, got shape {tuple(projections.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if projections.dtype != torch.float64:
        projections = projections.float()
    with torch.autocast(projections.device.type, enabled=False):
        unit = F.normalize(projections, dim=1)
        logits = unit @ unit.T / temperature
    logits = logits.masked_fill(torch.eye(anchors, dtype=torch.bool, device=logits.device), float("-inf"))
    positives = torch.arange(anchors, device=logits.device).roll(anchors // 2)
    return F.cross_entropy(logits, positives)
