"""Figures of a batch's features during training: `rankme`, and `online_knn` if there are labels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 4096  # images whose nearest neighbour is searched, at most: the first ones of a larger batch


def rankme(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023), the effective rank of features [N, F], from 1 to min(N, F).

    It is the exponential of the entropy of the singular values as shares of their sum; NaN if a feature isn't
    finite. Computed in fp64 from the smaller Gram matrix, whose eigenvalues are the squared singular values.
    """
    h = features.double()
    if not bool(h.isfinite().all()):
        return math.nan
    gram = h @ h.T if len(h) < h.shape[1] else h.T @ h
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(p).sum().exp())


def online_knn(features: Tensor, labels: Tensor) -> float:
    """Percentage of images [B, F] whose nearest other image by cosine has their class; labels int64 [B]."""
    unit = F.normalize(features.float(), dim=1)
    cosines = (unit[:QUERIES] @ unit.T).fill_diagonal_(-math.inf)
    return 100 * float((labels[cosines.argmax(dim=1)] == labels[:QUERIES]).float().mean())


def figures(views: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Both figures of the features of two views of B images, [2, B, F]: the rank of all 2 B views, and the
    neighbours among the first views."""
    found = {"rankme": rankme(views.flatten(0, 1))}
    return found if labels is None else found | {"online_knn": online_knn(views[0], labels)}
