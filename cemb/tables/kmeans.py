"""k-means (Lloyd, "Least squares quantization in PCM", 1982), for tables that store codes of centroids."""

import torch
from torch import Tensor


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Number of the nearest of the rising `levels` to each of the values, of any shape."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Number ``[n]`` of the nearest of the centroids ``[clusters, width]`` to each vector ``[n, width]``."""
    if vectors.shape[1] == 1:
        rising, order = centroids[:, 0].sort()
        return order[nearest_level(vectors[:, 0].contiguous(), rising)]
    norms = centroids.square().sum(1)
    chunks = vectors.split(max(1, 2**18 // len(centroids)))  # distances that stay in cache
    return torch.cat([torch.addmm(norms, chunk, centroids.T, alpha=-2).argmin(dim=1) for chunk in chunks])


def k_means(vectors: Tensor, num_clusters: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Centroids ``[num_clusters, width]`` of the vectors ``[n, width]`` after `num_steps` iterations.

    They start at different vectors, as far as there are any. Clusters that become empty start anew at the
    vectors which are worst served.
    """
    centroids = vectors[torch.randperm(len(vectors), generator=generator)[:num_clusters]]
    if len(centroids.unique(dim=0)) < num_clusters:
        distinct: Tensor = vectors.unique(dim=0)
        centroids = distinct[torch.randperm(len(distinct), generator=generator)[:num_clusters]]
        if len(distinct) <= num_clusters:
            return torch.cat((centroids, centroids[:1].expand(num_clusters - len(centroids), -1)))
    for _ in range(num_steps):
        codes = nearest(vectors, centroids)
        counts = codes.bincount(minlength=num_clusters)
        empty = (counts == 0).nonzero().squeeze(1)
        distances = (vectors - centroids[codes]).square().sum(1) if len(empty) else vectors[:, 0]
        # In float64 sums over large clusters lose nothing that matters.
        sums = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, codes, vectors.double())
        centroids = (sums / counts.clamp(min=1).unsqueeze(1)).to(vectors.dtype)
        centroids[empty] = vectors[distances.topk(len(empty)).indices]
    return centroids
