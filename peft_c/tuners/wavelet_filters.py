"""A wavelet as an object that has its four filters, which PEFT's `waveft.wavelet` and programs that use it know."""

from __future__ import annotations

from .wavelets import LENGTHS, filters


class Wavelet:
    """The wavelet called `name`: low- and high-pass filters of decomposition (`dec_lo`, `dec_hi`) and reconstruction
    (`rec_lo`, `rec_hi`), lists of floats. ValueError: an unknown name."""

    def __init__(self, name: str) -> None:
        self.name = name.lower()
        family = "db1" if self.name == "haar" else self.name
        if family not in LENGTHS:
            raise ValueError(f"Unknown wavelet name '{self.name}'. Available wavelets: {list(LENGTHS)}")
        self.rec_lo, self.rec_hi = map(list, filters(family))
        self.dec_lo, self.dec_hi = self.rec_lo[::-1], self.rec_hi[::-1]
        self.dec_len = self.rec_len = LENGTHS[family]
        self.filter_bank = self.dec_lo, self.dec_hi, self.rec_lo, self.rec_hi

    def __len__(self) -> int:
        return self.dec_len

    def __repr__(self) -> str:
        return f"Wavelet(name='{self.name}')"


def wavelist() -> list[str]:
    """The names of all wavelets."""
    return [*LENGTHS, "haar"]
