"""Figures of a batch's features while they are trained: `rankme`, and with labels `online_knn`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 4096  # images at most whose nearest are looked for: of larger batches those of its first


def rankme(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023), the effective rank of features [N, F], from 1 to min(N, F).

    The exponential of the entropy of the singular values over their sum; NaN where one isn't finite. It is
    computed in fp64 from the smaller Gram matrix's eigenvalues, whose roots the singular values are.
    """
    h = features.double()
    if not bool(h.isfinite().all()):
        return math.nan
    gram = h @ h.T if len(h) < h.shape[1] else h.T @ h
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(p).sum().exp())


def online_knn(features: Tensor, labels: Tensor) -> float:
    """Percent of images [B, F] whose nearest other image, by cosine, is of their class; labels int64 [B]."""
    unit = F.normalize(features.float(), dim=1)
    cosines = (unit[:QUERIES] @ unit.T).fill_diagonal_(-math.inf)
    return 100 * float((labels[cosines.argmax(dim=1)] == labels[:QUERIES]).float().mean())


def figures(views: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Both, of the features of two views of B images, [2, B, F]: the rank of all 2 B, the neighbours among
    the first views."""
    found = {"rankme": rankme(views.flatten(0, 1))}
    return found if labels is None else found | {"online_knn": online_knn(views[0], labels)}
