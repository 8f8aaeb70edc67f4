"""Principal components of data that comes in batches, in PyTorch on any device.

The algorithm is scikit-learn's IncrementalPCA (Ross et al., 2008): the decomposition so far, written as singular
values times components, is stacked on the new centred batch together with a row that corrects for the shift of the
mean, and the stack is decomposed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class IncrementalPCA:
    """Incremental PCA with scikit-learn's attributes (`components_`, `singular_values_`, `mean_`, `var_`, ...).

    Args:
        n_components: Number of components to keep; by default the smaller side of the first batch.
        copy: Whether to leave input tensors alone (default) or to centre them in place.
        batch_size: Rows per batch in `fit`; by default 5 times the number of features.
        svd_driver: cuSOLVER method for `torch.linalg.svd` on CUDA: None, "gesvd", "gesvdj" or "gesvda".
        lowrank: Use the randomised `torch.svd_lowrank`, which is faster for few components.
        lowrank_q: Rank of that approximation; by default twice `n_components`, which must then be given.
        lowrank_niter: Its number of subspace iterations.
        lowrank_seed: Seed of its random projection; the global random state is left as it was.
    """

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ):
        self.n_components = n_components
        self.copy = copy
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None
        if lowrank:
            self._validate_lowrank_params()

    def _validate_lowrank_params(self) -> None:
        if self.lowrank_q is None:
            if self.n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            self.lowrank_q = 2 * self.n_components
        elif self.n_components is not None and self.lowrank_q < self.n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")

    def _svd_fn_full(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)

    def _svd_fn_lowrank(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seeded = self.lowrank_seed is not None
        with torch.random.fork_rng(enabled=seeded):
            if seeded:
                torch.manual_seed(self.lowrank_seed)
            U, S, V = torch.svd_lowrank(X, q=self.lowrank_q, niter=self.lowrank_niter)
        return U, S, V.mH

    def _validate_data(self, X: Any) -> torch.Tensor:
        """`X` as a float32 or float64 matrix, a copy unless `copy` is off; ValueError if it is too small."""
        if not isinstance(X, torch.Tensor):
            X = torch.tensor(X, dtype=torch.float32)
        elif self.copy:
            X = X.clone()
        n_samples, n_features = X.shape
        wanted = self.n_components or 0
        if wanted > n_features:
            raise ValueError(
                f"n_components={wanted} invalid for n_features={n_features}, "
                "need more rows than columns for IncrementalPCA processing."
            )
        if wanted > n_samples:
            raise ValueError(f"n_components={wanted} must be less or equal to the batch number of samples {n_samples}")
        return X if X.dtype in (torch.float32, torch.float64) else X.float()

    @staticmethod
    def _incremental_mean_and_var(
        X: torch.Tensor,
        last_mean: torch.Tensor | None,
        last_variance: torch.Tensor | None,
        last_sample_count: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Mean, variance and count over the rows seen before and those of `X` (n, features); float64 sums.

        Chan, Golub and LeVeque's update: unnormalised variances add up, plus a term for the distance of the means.
        """
        rows = X.shape[0]
        if rows == 0:
            return last_mean, last_variance, last_sample_count
        for name, value in (("last_mean", last_mean), ("last_variance", last_variance)):
            if value is None and last_sample_count > 0:
                raise ValueError(f"{name} should not be None if last_sample_count > 0.")

        new_count = torch.tensor([rows], device=X.device)
        count = last_sample_count + new_count
        new_sum = X.sum(dim=0, dtype=torch.float64)
        last_sum = torch.zeros_like(new_sum) if last_mean is None else last_mean * last_sample_count
        mean = (last_sum + new_sum) / count

        centred = X - new_sum / new_count
        # what rounding left of the sum over the centred rows, squared, corrects the sum of squares
        residue = centred.sum(dim=0, dtype=torch.float64).square() / new_count
        unnormalised = centred.square().sum(dim=0, dtype=torch.float64) - residue
        if last_variance is not None:
            ratio = last_sample_count.double() / new_count
            distance = (last_sum / ratio - new_sum).square()
            unnormalised = last_variance * last_sample_count + unnormalised + ratio / count * distance
        return mean, unnormalised / count, count

    @staticmethod
    def _svd_flip(
        u: torch.Tensor, v: torch.Tensor, u_based_decision: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the signs of singular vectors unique, in place: the largest entry of each is positive.

        The decision is taken on the columns of `u` (n, k) or, otherwise, on the rows of `v` (k, m).
        """
        deciding = u.mT if u_based_decision else v
        largest = deciding.abs().argmax(dim=1, keepdim=True)
        signs = deciding.gather(1, largest).sign()
        u *= signs[: u.shape[1]].mT
        v *= signs
        return u, v

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Fit to `X` (samples, features) in batches of `batch_size` rows."""
        if check_input:
            X = self._validate_data(X)
        n_samples, n_features = X.shape
        if self.batch_size is None:
            self.batch_size = 5 * n_features
        for rows in self.gen_batches(n_samples, self.batch_size, min_batch_size=self.n_components or 0):
            self.partial_fit(X[rows], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Update the fit with one more batch `X` (samples, features); ValueError if the features changed."""
        if check_input:
            X = self._validate_data(X)
        n_samples, n_features = X.shape
        first_pass = not hasattr(self, "components_")
        if first_pass:
            self.mean_ = self.var_ = None
            self.n_samples_seen_ = torch.tensor([0], device=X.device)
            self.n_features_ = n_features
            self.n_components = self.n_components or min(n_samples, n_features)
        elif n_features != self.n_features_:
            raise ValueError(
                "Number of features of the new batch does not match the number of features of the first batch."
            )

        mean, var, count = self._incremental_mean_and_var(X, self.mean_, self.var_, self.n_samples_seen_)
        if first_pass:
            X -= mean
        else:
            batch_mean = X.mean(dim=0)
            X -= batch_mean
            shift = torch.sqrt((self.n_samples_seen_.double() / count) * n_samples) * (self.mean_ - batch_mean)
            X = torch.vstack((self.singular_values_[:, None] * self.components_, X, shift))

        U, S, Vt = self._svd_fn_lowrank(X) if self.lowrank else self._svd_fn_full(X)
        _, Vt = self._svd_flip(U, Vt, u_based_decision=False)
        energy = S**2
        explained = energy / (count - 1)

        k = self.n_components
        self.n_samples_seen_, self.mean_, self.var_ = count, mean, var
        self.components_, self.singular_values_ = Vt[:k], S[:k]
        self.explained_variance_ = explained[:k]
        self.explained_variance_ratio_ = (energy / torch.sum(var * count))[:k]
        self.noise_variance_ = (
            torch.tensor(0.0, device=X.device) if k in (n_samples, n_features) else explained[k:].mean()
        )
        return self

    def transform(self, X: torch.Tensor) -> torch.Tensor:
        """`X` (samples, features) minus the mean, projected on the components: (samples, n_components)."""
        X = X - self.mean_
        return (X.double() @ self.components_.T).to(X.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` that cover 0 to `n`; the last takes the rest, so that none has < `min_batch_size`."""
        start = 0
        while start < n:
            end = start + batch_size
            if end + min_batch_size > n:
                end = n
            yield slice(start, end)
            start = end
