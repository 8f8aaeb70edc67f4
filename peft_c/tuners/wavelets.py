"""Orthogonal wavelet filters and one level of the discrete wavelet transform, for WaveFT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# scaling filters of the coiflets, which have no closed form (I. Daubechies, Ten Lectures on Wavelets, table 8.1);
# coif4 with the values that PEFT has, which are not quite orthogonal: trained adapters depend on them
COIFLETS = {
    "coif1": """
        -0.05142972847076845 0.23892972847076846 0.6028594569415369 0.2721405430584631 -0.05142972847076845
        -0.011070271529231544
        """,
    "coif2": """
        0.011587596738716868 -0.029320137983468563 -0.04763959031100813 0.2730210465347666 0.5746823938568638
        0.2948671936956192 -0.05408560709171143 -0.042026480460771606 0.016744410163279506 0.003967883612962012
        -0.0012892033561406595 -0.0005095053991076441
        """,
    "coif3": """
        -0.0026824186709220686 0.005503126707831385 0.016583560479170346 -0.046507764478726975 -0.043220763560211914
        0.28650333527364746 0.56128525687033 0.30298357177282415 -0.050770140754888865 -0.05819625076158553
        0.024434094321166958 0.011229240962037866 -0.006369601011048823 -0.0018204589155662422 0.0007902051009575939
        0.000329665173793183 -5.019277455327665e-05 -2.4465734255308132e-05
        """,
    "coif4": """
        0.0006309612114309468 -0.0011522251437699736 -0.005194525163470323 0.01136093089978195 0.01894506104561664
        -0.05171984370581528 -0.03448614047094481 0.30227251053656845 0.5545479062408811 0.30791766802517506
        -0.0435250092812657 -0.064887950971431 0.01988077364815952 0.017638947871261697 -0.007366054847173364
        -0.002312432307658842 0.0014260063442333715 0.00046669846355373536 -0.0001270007842387334
        -0.0001130536369789105 3.048364879677801e-05 1.2667448089330081e-05 -1.5849265807568937e-06
        -1.1239480882815428e-06
        """,
}
# which groups of roots of a symlet lie outside the unit circle, as bits; none: it is the Daubechies filter
SYMLETS = {2: 0, 3: 0, 4: 2, 5: 1, 6: 5, 7: 1, 8: 10, 9: 6, 10: 21}

LENGTHS = {
    **{f"db{n}": 2 * n for n in range(1, 11)},
    **{f"sym{n}": 2 * n for n in SYMLETS},
    **{name: len(values.split()) for name, values in COIFLETS.items()},
}
# by how many rows and columns reconstruction shrinks a matrix: what PEFT pads it by
WAVELET_REDUCTIONS = {name: (length - 2, length - 2) for name, length in LENGTHS.items()}


def _factorise(n: int, outside: int) -> list[float]:
    """The filter with n vanishing moments whose groups of roots in `outside` (bits) lie outside the unit circle.

    |H|^2 has n zeros at -1 and, for every root y of sum_k C(n - 1 + k, k) y^k, the pair z + 1 / z = 2 - 4 y, of which
    H gets one (Daubechies' spectral factorisation). A complex y and its conjugate are one group.
    """
    import numpy as np

    roots = [-1.0] * n
    halves = np.roots([math.comb(n - 1 + k, k) for k in reversed(range(n))])
    groups = sorted((y for y in halves if y.imag > -1e-12), key=lambda y: y.real)
    for group, y in enumerate(groups):
        middle = 1 - 2 * y
        z = middle + np.sqrt(middle * middle - 1 + 0j)
        if (abs(z) > 1) != bool(outside >> group & 1):
            z = 1 / z
        roots += [z] if abs(y.imag) < 1e-9 else [z, z.conjugate()]
    taps = np.poly(roots).real
    return (taps * (math.sqrt(2) / taps.sum())).tolist()


_filters: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}  # a dict, as torch.compile traces through caches


def filters(family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The low-pass and the high-pass filter of reconstruction."""
    if family in _filters:
        return _filters[family]
    if family in COIFLETS:
        low = [math.sqrt(2) * float(value) for value in COIFLETS[family].split()]
    else:
        kind, n = ("db", int(family[2:])) if family.startswith("db") else ("sym", int(family[3:]))
        low = _factorise(n, SYMLETS[n] if kind == "sym" else 0)
    high = [(-1) ** i * tap for i, tap in enumerate(reversed(low))]
    return _filters.setdefault(family, (tuple(low), tuple(high)))


def _bank(family: str, like: torch.Tensor) -> tuple[torch.Tensor, int]:
    bank = torch.tensor(filters(family), device=like.device, dtype=like.dtype).unsqueeze(1)
    return bank, LENGTHS[family] - 2


def padded(size: int, family: str) -> int:
    """How many coefficients a row of `size` numbers has: an even number."""
    size += LENGTHS[family] - 2
    return size + size % 2


def support(places: torch.Tensor, size: int, family: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where, of `size` numbers, each of the coefficients at `places` goes, and how strongly: two (n, taps).

    What goes beyond the ends is at 0 with strength 0.
    """
    bank, crop = _bank(family, like)
    half = padded(size, family) // 2
    taps = torch.arange(bank.shape[-1], device=places.device)
    where = 2 * (places % half).unsqueeze(1) - crop + taps
    inside = (where >= 0) & (where < size)
    return where * inside, bank[places // half, 0] * inside


def synthesise(coefficients: torch.Tensor, size: int, family: str) -> torch.Tensor:
    """Rows of `size` numbers from rows of coefficients: low frequencies, then high ones."""
    bank, crop = _bank(family, coefficients)
    bands = coefficients.unflatten(-1, (2, -1))
    return F.conv_transpose1d(bands, bank, stride=2, padding=crop).squeeze(1)[:, :size]


def waverec2d(coeffs: list, wavelet: object, axes: tuple[int, int] = (-2, -1)) -> torch.Tensor:
    """The inverse of the two-dimensional transform: of [low, (horizontal, vertical, diagonal details), ...], coarse
    levels first, each (..., rows, columns) along `axes`. wavelet: its name, or what has that as an attribute."""
    family = getattr(wavelet, "name", wavelet).replace("haar", "db1")
    low = coeffs[0].movedim(axes, (-2, -1))
    for details in coeffs[1:]:
        horizontal, vertical, diagonal = (detail.movedim(axes, (-2, -1)) for detail in details)
        low = low[..., : diagonal.shape[-2], : diagonal.shape[-1]]
        low = torch.cat([torch.cat([low, vertical], -1), torch.cat([horizontal, diagonal], -1)], -2)
        for _ in range(2):
            size = low.shape[-1] - LENGTHS[family] + 2
            low = synthesise(low.flatten(0, -2), size, family).unflatten(0, low.shape[:-1]).mT
    return low.movedim((-2, -1), axes)


def analyse(rows: torch.Tensor, family: str) -> torch.Tensor:
    """The transpose of `synthesise`."""
    bank, crop = _bank(family, rows)
    even = F.pad(rows, (0, rows.shape[-1] % 2)).unsqueeze(1)
    return F.conv1d(even, bank, stride=2, padding=crop).flatten(1)
