"""What a merge keeps so that it can be taken out again, to the bit: one `Merge` a step, with one `Saved` a weight.

The record in a `Saved` is the kernels' own (bytes that say where subtracting the change gives other bits), or

| record       | made for                    | it has                              | the merged bits are known by |
|--------------|-----------------------------|-------------------------------------|------------------------------|
| `Difference` | other values, full deltas   | the old values, all or where needed | a digest                     |
| `Places`     | a few elements              | their places and old values         | a digest of these            |
| `Product`    | a weight times a vector     | the old values, the vector          | a hash of each block         |

Each writes a weight and itself, and restores the old bits, in one pass of C where C may act, with torch operations
elsewhere. Nothing is restored over values that others have written since: then the reason is returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _C
from .changes import Elements, LowRank, Times

FEW = 64  # elements with one value of a vector, which are better given a value each


def wider_sum(tensor: torch.Tensor, delta: torch.Tensor, alpha: int) -> torch.Tensor:
    """tensor + alpha * delta, rounded once to the dtype of `tensor` (8-bit floats: clamped to their range)."""
    if tensor.element_size() > 1:
        return torch.add(tensor, delta.to(tensor.device), alpha=alpha).to(tensor.dtype)
    info = torch.finfo(tensor.dtype)
    return torch.add(tensor.to(delta.dtype), delta, alpha=alpha).clamp(info.min, info.max).to(tensor.dtype)


def write(weight: torch.Tensor, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Set the values of `tensor`, the data of `weight`, and let autograd know."""
    tensor.copy_(value)
    _wrote(weight)


def _wrote(weight: torch.Tensor) -> None:
    """Let autograd know that the weight has been written to."""
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


def meta_of(tensor: torch.Tensor) -> tuple:
    """What a record fits: dtype and shape."""
    return tensor.dtype, tensor.shape


@dataclass(eq=False)
class Merge:
    """One step of a layer's merging: adapters merged in one pass, or one that is merged by itself (`alone`): by its
    variant, or by replacing the weight."""

    adapters: list[str]
    saved: list[Saved] = field(default_factory=list)
    alone: bool = False


@dataclass(eq=False)
class Saved:
    """What undoing one merge of one weight needs: `undo` is the kernels' record (one bytearray a matrix), a
    `Difference`, or None (then the change is subtracted)."""

    label: str
    changes: list[Any]  # LowRank snapshots, or the dense delta
    undo: Any = None
    meta: tuple = ()  # `meta_of` the weight it was made for

    def nbytes(self) -> int:
        """Bytes held: the snapshot and the record."""
        parts = [t for c in self.changes for t in (c[:2] if isinstance(c, LowRank) else (c,))]
        if isinstance(self.undo, Difference):
            record = self.undo.nbytes()
        else:
            record = sum(len(part) for part in self.undo or ())
        return record + sum(t.numel() * t.element_size() for t in parts)


def records(layer: Any) -> list[Merge]:
    """The layer's merges, in order, each with what undoes it (a plain attribute: not part of the state dict)."""
    return layer.__dict__.setdefault("_merge_records", [])


def record_bytes(layer: Any) -> int:
    """Bytes that the layer holds to be able to unmerge."""
    return sum(saved.nbytes() for step in layer.__dict__.get("_merge_records", ()) for saved in step.saved)


# ------------------------------------------------------------------------------------------------------- the records

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which a process has a part."""
    return hasattr(tensor, "to_local")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).flatten()


@dataclass
class Difference:
    """The old values: all, or, for what torch operations have added, those that subtraction would not give."""

    digest: Any  # of the merged bits, an int as a rule; None: not known any more
    index: torch.Tensor | None
    old: torch.Tensor

    @staticmethod
    def digest_of(tensor: torch.Tensor) -> int:
        tensor = tensor.to_local() if is_sharded(tensor) else tensor
        digest = _C.digest(tensor)
        if digest is not None:
            return digest
        bits = _bits(tensor)
        bits = bits.view(tensor.shape[0] if tensor.ndim and bits.numel() else 1, -1)
        words = 8 // bits.element_size()  # 8 bytes at a time are summed several times faster
        if bits.numel() and bits.shape[1] % words == 0 and bits.storage_offset() % words == 0:
            bits = bits.view(torch.int64)
        rows = bits.sum(-1, dtype=torch.int64)
        return int((rows * torch.arange(1, 2 * rows.numel(), 2, device=rows.device)).sum())

    @classmethod
    def between(cls, old: torch.Tensor, new: torch.Tensor, undone: torch.Tensor | None) -> Difference:
        index = None
        values = _bits(old)
        if undone is not None:
            wrong = (values != _bits(undone)).nonzero().flatten()
            if wrong.numel() * (8 + old.element_size()) < old.numel() * old.element_size():
                index, values = wrong, values[wrong]
        return cls(cls.digest_of(new), index, values.clone())

    @classmethod
    def exchange(
        cls, weight: torch.Tensor, tensor: torch.Tensor, value: torch.Tensor, add: bool, check: bool
    ) -> Difference | None:
        """tensor = value (`add`: tensor + value) and the record of what it was, made in the memory of `value`, which
        nobody else may hold; None with `check` if a result is not finite: nothing has changed then."""
        done = _C.exchange(tensor, value, add, check, weight)
        if done is not None:
            finite, digest = done
            return cls(digest, None, value) if finite else None
        new = wider_sum(tensor, value, 1) if add else value
        if check and not torch.isfinite(new).all():
            return None
        old = tensor.clone()
        write(weight, tensor, new)
        return cls(cls.digest_of(tensor), None, old)

    @classmethod
    def adding(cls, weight: torch.Tensor, tensor: torch.Tensor, delta: torch.Tensor, check: bool) -> Difference | None:
        """tensor += delta, which stays as it is; for small ones. Otherwise as `exchange`."""
        old = torch.empty_like(tensor)
        done = _C.combine(tensor, old, delta, 1, False, None, check, weight)
        if done is not None:
            return cls(done[1], None, old) if done[0] else None
        return cls.exchange(weight, tensor, wider_sum(tensor, delta, 1), False, check)

    def mismatch(self, tensor: torch.Tensor, fits: bool) -> str | None:
        """What has happened to `tensor` since the merge, if anything; `fits`: it has the dtype and shape it had."""
        if not fits or self.old.device != tensor.device:
            return "was cast, reshaped or moved"
        return None if self.digest_of(tensor) == self.digest else "was written to"

    def restore(self, tensor: torch.Tensor, undone: torch.Tensor | None) -> torch.Tensor:
        """The old values, given the merged `tensor` less its change (`undone`; None: they are all here)."""
        if self.index is None:
            return self.old if is_sharded(tensor) else self.old.view(tensor.dtype).view(tensor.shape)
        bits = _bits(undone).clone()
        bits[self.index] = self.old
        return bits.view(tensor.dtype).view(tensor.shape)

    def put_back(self, weight: torch.Tensor, tensor: torch.Tensor, fits: bool) -> str | None:
        """`swap`, or nothing if there is a `mismatch`, which is returned."""
        known = fits and self.digest is not None
        done = _C.restore(tensor, self.old, self.digest, weight, self.index) if known else None
        if done is not None:
            return None if done else "was written to"
        reason = self.mismatch(tensor, fits)
        if reason is None:
            self.swap(weight, tensor)
        return reason

    def swap(self, weight: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write the old values, which are all here, to `tensor` and keep those that were there."""
        if _C.exchange(tensor, self.old, False, False, weight) is None:
            before = tensor.clone()
            write(weight, tensor, self.restore(tensor, None))
            self.old = before

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.index, self.old) if t is not None)


class Places(Difference):
    """The record of changed elements: their places and old values. What others write elsewhere does not matter."""

    @classmethod
    def of(cls, weight: torch.Tensor, tensor: torch.Tensor, change: Elements, check: bool) -> Places | None:
        """Make the change of `tensor`; the record, or None as in `exchange`."""
        places = change.places.clone()  # others may write to the adapter's
        old = torch.empty_like(change.values, dtype=tensor.dtype)
        done = _C.combine(tensor, old, change.values, 1, False, places, check, weight)
        if done is None:
            flat, places = tensor.view(-1), places.long()
            old = flat.index_select(0, places)
            new = wider_sum(old, change.values, 1)
            done = not check or bool(torch.isfinite(new).all()), cls.digest_of(new)
            if done[0]:
                flat.index_copy_(0, places, new)
                _wrote(weight)
        return cls(done[1], places, old) if done[0] else None

    def restore(self, tensor: torch.Tensor, undone: torch.Tensor | None) -> torch.Tensor:
        return tensor.flatten().index_copy(0, self.index.long(), self.old).view(tensor.shape)

    def mismatch(self, tensor: torch.Tensor, fits: bool) -> str | None:
        if fits and tensor.device == self.index.device:
            tensor = tensor.view(-1).index_select(0, self.index)
        return super().mismatch(tensor, fits)

    def swap(self, weight: torch.Tensor, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        before = flat.index_select(0, self.index)
        flat.index_copy_(0, self.index.long(), self.old)
        self.old = before
        _wrote(weight)


@dataclass
class Product(Difference):
    """The record of a weight that C has multiplied: the old values, and what it was multiplied by (`vector`, each of
    its values `run` times), to do that again; `digest` is bytes, a hash for each block of the weight."""

    vector: torch.Tensor
    run: int

    @classmethod
    def of(cls, weight: torch.Tensor, tensor: torch.Tensor, change: Times, check: bool) -> Difference | None:
        """Make the change of `tensor`; the record, or None as in `exchange`."""
        run, vector = tensor.shape[change.dim + 1 :].numel(), change.vector
        vector, run = (vector.repeat_interleave(run), 1) if 1 < run < FEW else (vector, run)
        product = cls(None, None, torch.empty_like(tensor), vector, run)
        done = _C.combine(tensor, product.old, vector, run, True, None, check, weight)
        if done is None:
            return Difference.exchange(weight, tensor, product.times(tensor), False, check)
        product.digest = done[1]
        return product if done[0] else None

    def times(self, tensor: torch.Tensor) -> torch.Tensor:
        """The product with `tensor`."""
        vector = self.vector.repeat_interleave(self.run).to(tensor.device)
        return (tensor.reshape(-1, vector.numel()) * vector).view(tensor.shape).to(tensor.dtype)

    def mismatch(self, tensor: torch.Tensor, fits: bool) -> str | None:
        if not fits or self.old.device != tensor.device:
            return "was cast, reshaped or moved"
        return None if torch.equal(_bits(tensor), _bits(self.times(self.old))) else "was written to"

    def put_back(self, weight: torch.Tensor, tensor: torch.Tensor, fits: bool) -> str | None:
        done = _C.uncombine(tensor, self.old, self.vector, self.run, self.digest, weight) if fits else None
        reason = self.mismatch(tensor, fits) if done is None else None if done else "was written to"
        if done is None and reason is None:
            write(weight, tensor, self.old)
        return reason

    def swap(self, weight: torch.Tensor, tensor: torch.Tensor) -> None:
        if _C.combine(tensor, self.old, self.vector, self.run, True, None, False, weight) is None:
            write(weight, tensor, self.times(self.old))

    def nbytes(self) -> int:
        return super().nbytes() + self.vector.nbytes
