"""MonteCLoRA's sampler: the variational parameters of an adapter and the noise drawn for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributions.wishart import Wishart


class BufferedMontecloraSampler:
    """Draws the noise of `buffer_size` training steps at once and hands it out step by step.

    One draw is `z_mvn` (num_samples, in_features, out_features) and `z_dirichlet` (num_samples,), standard normal, and
    `z_wishart` (out_features, out_features) from a Wishart distribution with `out_features` degrees of freedom.
    """

    def __init__(self, model: MontecloraSampler, buffer_size: int = 150, device: Any = None) -> None:
        self.model = model
        self.device = device if device is not None else _infer_device()
        self.buffer_size = buffer_size
        self.buffer: list[dict[str, torch.Tensor]] = []
        self.index = 0
        n = model.out_features
        self.wish_sampler = Wishart(df=n, scale_tril=torch.eye(n, device=self.device))
        self._refill_buffer()

    @torch.no_grad()
    def _refill_buffer(self) -> None:
        model, dtype = self.model, self.model.dtype
        shape = (self.buffer_size, model.num_samples)
        mvn = torch.randn(*shape, model.in_features, model.out_features, device=self.device, dtype=dtype)
        dirichlet = torch.randn(shape, device=self.device, dtype=dtype)
        # Bartlett's decomposition needs fp32; only the result is cast
        wishart = [self.wish_sampler._bartlett_sampling(torch.Size()) for _ in range(self.buffer_size)]
        self.buffer = [
            {"z_mvn": mvn[i], "z_wishart": wishart[i].to(self.device, dtype), "z_dirichlet": dirichlet[i]}
            for i in range(self.buffer_size)
        ]
        self.index = 0

    def get(self) -> dict[str, torch.Tensor]:
        """The next draw; makes new ones when all are used."""
        if self.index >= self.buffer_size:
            self._refill_buffer()
        self.index += 1
        return self.buffer[self.index - 1]


class MontecloraSampler(nn.Module):
    """Samples perturbations of a LoRA A matrix and the weights to average them with.

    `in_features` and `out_features` are those of `lora_A`, so `out_features` is the rank. Trainable are `std_prior`
    (log deviations, out_features) and `expert_weights_prior` (log concentrations, num_samples).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool = True,
        dirichlet_prior: float = 1.0,
        sample_scaler: float = 3e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 10,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.num_samples = num_samples
        self.use_entropy = use_entropy
        self.device = device if device is not None else _infer_device()
        self.dtype = dtype
        self.sample_scaler = sample_scaler
        self.kl_loss_weight = kl_loss_weight
        self.dirichlet_prior = dirichlet_prior
        self.std_prior = nn.Parameter(torch.rand(out_features, dtype=dtype))
        self.expert_weights_prior = nn.Parameter(torch.rand(num_samples, dtype=dtype))
        self.register_buffer("gaussian_var_prior", torch.eye(out_features, dtype=dtype))
        self.register_buffer("expert_weights", torch.ones(num_samples, dtype=dtype) / num_samples)
        self.sampler = BufferedMontecloraSampler(self, buffer_size=buffer_size, device=self.device)
        self.to(self.device)

    def wishart_reparameterization(self, std: torch.Tensor, z_wishart: torch.Tensor) -> torch.Tensor:
        """The diagonal part of `std z std^T`, at least 1e-3, as a matrix."""
        return torch.diag((std @ z_wishart @ std.T).diag().clip(min=1e-3))

    def multivariate_reparameterization(self, z_mvn: torch.Tensor, cov_matrix: torch.Tensor) -> torch.Tensor:
        """Normal noise with the given covariance of the last axis, times `sample_scaler`."""
        noise = z_mvn @ _cholesky(cov_matrix)
        return self.sample_scaler * torch.nan_to_num(noise, nan=1e-3)

    def dirichlet_reparameterization(self, alpha: torch.Tensor, z_dirichlet: torch.Tensor) -> torch.Tensor:
        """Logits whose softmax is close to Dirichlet(alpha): the Laplace approximation in the softmax basis."""
        eps, n = 1e-6, self.num_samples
        alpha = alpha.clamp(min=eps)
        log_alpha = alpha.log()
        variance = (1 - 2 / n) / alpha + (1 / alpha).sum() / n**2
        sigma = torch.diag(variance.clamp(min=eps)) + eps * torch.eye(n, device=alpha.device)
        try:
            factor = _cholesky(sigma)
        except torch.linalg.LinAlgError:
            factor = _cholesky(sigma + 1e-4 * torch.eye(n, device=alpha.device))
        noise = factor @ z_dirichlet.to(factor.dtype)
        return noise.to(alpha.dtype) + log_alpha - log_alpha.mean()

    def dirichlet_kl(self, alpha2: torch.Tensor) -> torch.Tensor:
        """Divergence of Dirichlet(alpha2) from the symmetric prior."""
        alpha1 = torch.full((self.num_samples,), self.dirichlet_prior, device=self.expert_weights_prior.device)
        total = alpha2.sum()
        return (
            torch.lgamma(total)
            - torch.lgamma(alpha1.sum())
            + (torch.lgamma(alpha2) - torch.lgamma(alpha1)).sum()
            + ((alpha2 - alpha1) * (torch.digamma(alpha2) - torch.digamma(total))).sum()
        )

    def wishart_kl(self, std: torch.Tensor) -> torch.Tensor:
        """Divergence of the Wishart scale `std std^T` (its diagonal) from the identity."""
        n, variance = self.out_features, (std @ std.T).diag()
        return 0.5 * n * (variance.sum() - variance.log().sum() - n)

    def multivariate_kl(self, var: torch.Tensor) -> torch.Tensor:
        """Divergence of `num_samples` normals with diagonal covariance `var` from the standard normal."""
        diagonal = var.diag().clamp(min=1e-6)
        return 0.5 * self.num_samples * (diagonal.sum() - diagonal.log().sum() - self.out_features)

    def get_variational_loss(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """The weighted KL divergence and the entropy term of the last sample, both 0.0 in eval mode."""
        if not self.training:
            return 0.0, 0.0
        kl = (
            self.dirichlet_kl(self.expert_weights_prior.exp())
            + self.wishart_kl(torch.diag(self.std_prior.exp()))
            + self.multivariate_kl(self.gaussian_var_prior)
        )
        return self.kl_loss_weight * kl, (self.expert_weights**2).sum() if self.use_entropy else 0

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturbations (num_samples, in_features, out_features) and their weights (num_samples,), which sum to 1."""
        # the parameters know where the module lives now, self.device only where it was born
        like = {"device": self.std_prior.device, "dtype": self.std_prior.dtype}
        sample = {name: value.to(**like) for name, value in self.sampler.get().items()}
        self.gaussian_var_prior = self.wishart_reparameterization(
            torch.diag(self.std_prior.exp()), sample["z_wishart"]
        )
        noise = self.multivariate_reparameterization(sample["z_mvn"], self.gaussian_var_prior)
        logits = self.dirichlet_reparameterization(self.expert_weights_prior.exp(), sample["z_dirichlet"])
        self.expert_weights = torch.softmax(logits, dim=-1)
        return noise, self.expert_weights


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """In fp32 whatever autocast says, since half precision makes it fail; the result has the argument's type."""
    with torch.amp.autocast(matrix.device.type, enabled=False):
        return torch.linalg.cholesky(matrix.float()).to(matrix.dtype)


def _infer_device() -> str:
    from peft_c.utils import infer_device

    return infer_device()
