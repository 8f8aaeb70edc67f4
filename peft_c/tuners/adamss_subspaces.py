"""How AdaMSS finds subspaces: singular vectors of weights and clusters of their rows."""

from __future__ import annotations

import torch


def slice_pca(
    tensor: torch.Tensor, r: int, device: torch.device | str, dtype: torch.dtype = torch.float32, random_seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """V^T (b, c, r, k) and U (b, c, n, r) of the largest singular values of matrices (b, c, n, k), always the same."""
    tensor = tensor.to(device)
    devices = {} if tensor.is_cpu else {"device_type": tensor.device.type}
    with torch.random.fork_rng([] if tensor.is_cpu else [tensor.device], **devices):
        torch.manual_seed(random_seed)
        q = min(r, *tensor.shape[2:])
        parts = [torch.svd_lowrank(matrix, q=q, niter=2) for matrix in tensor.flatten(0, 1)]
    U, _, V = (torch.stack(part).unflatten(0, tensor.shape[:2]).to(dtype) for part in zip(*parts, strict=True))
    return V.mT, U


def clustering_Z(VT: torch.Tensor, num_subspaces: int, iternum: int) -> tuple[torch.Tensor, int]:
    """The cluster of each row (k-means), and how many clusters there are: at most one for each row."""
    from sklearn.cluster import KMeans

    count = min(num_subspaces, len(VT))
    kmeans = KMeans(n_clusters=count, init="random", n_init=1, max_iter=iternum, random_state=123456789)
    return torch.from_numpy(kmeans.fit_predict(VT.detach().cpu().numpy().astype("float32"))).long(), count


def seg_locations(index: torch.Tensor) -> dict[int, torch.Tensor]:
    """The rows of each cluster."""
    return {i: torch.where(index == i)[0] for i in range(int(index.max()) + 1)}


def get_trainable_subspaces(num_subspaces: int) -> list[int]:
    """Those that are trained in the beginning: all."""
    return list(range(num_subspaces))
