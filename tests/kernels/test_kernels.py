"""The kernels: every ISA against float64 numpy and each other, exact unmerge, records, threads, bad input."""

import ctypes as C

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from . import klib
from .klib import BF16, CHANGED, CHECK, DTYPES, EINVAL, F16, F32, F64, FULL_RECORD, NONFINITE, OK

LIB = klib.load()
ISAS = klib.isas(LIB)
EPS = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-8, F16: 2.0**-11}
PAR = C.cast(LIB.shim_parallel, C.c_void_p)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 20))
dtypes = st.sampled_from(sorted(DTYPES.values()))
seeds = st.integers(0, 2**31)


@pytest.fixture(params=ISAS)
def isa(request):
    before = LIB.pk_isa_name()
    assert LIB.pk_isa_select(request.param.encode()) == 0
    yield request.param
    LIB.pk_isa_select(before)


def select(name):
    assert LIB.pk_isa_select(name.encode()) == 0


def bits(a):
    return np.ascontiguousarray(a).view(f"u{a.itemsize}")


def lay_out(a, kind):
    """The same values with other strides: C, Fortran, both stepped, reversed."""
    if kind == 0:
        return np.ascontiguousarray(a)
    if kind == 1:
        return np.asfortranarray(a)
    if kind == 2:
        big = np.zeros((2 * a.shape[0] + 1, 3 * a.shape[1] + 1), a.dtype)
        view = big[1::2, 1::3][: a.shape[0], : a.shape[1]]
        view[...] = a
        return view
    return np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1]


def random(rng, shape, dtype, scale=1.0, kind=0):
    return lay_out(klib.narrow(rng.standard_normal(shape) * scale, dtype), kind)


def adapter_dtype(rng, dtype):
    return dtype if rng.integers(2) else F32


def random_factors(rng, n, k, r, dtype, nf=1, size=0.05):
    parts = []
    for i in range(nf):
        da = adapter_dtype(rng, dtype)
        a = random(rng, (r + i, k), da, size, rng.integers(4))
        b = random(rng, (n, r + i), da, size, rng.integers(4))
        parts.append((a, da, b, da, float(rng.uniform(0.2, 2))))
    return parts


def dense(parts, n, k):
    d = np.zeros((n, k))
    for a, da, b, db, s in parts:
        d += s * klib.widen(b, db) @ klib.widen(a, da)
    return d


class Weight:
    """A weight with its workspace and record."""

    def __init__(self, w, dtype, capacity=None):
        self.w, self.dtype, self.mat = w, dtype, klib.mat(w, dtype)
        self.capacity = LIB.pk_record_bound(self.mat) if capacity is None else capacity

    def record(self):
        block, pointer = klib.buffer(self.capacity)
        rec = klib.Record(pointer, self.capacity, 0)
        rec.keep = block
        return rec

    def work(self, old, new):
        return klib.buffer(LIB.pk_merge_work(self.mat, old, new))

    def merge(self, d, flags=0, rec=None, par=None):
        keep, p = self.work(d, None)
        return LIB.pk_merge(self.mat, d, flags, rec, p, par)

    def unmerge(self, d, rec=None, par=None):
        keep, p = self.work(d, None)
        return LIB.pk_unmerge(self.mat, d, rec, p, par)

    def switch(self, old, old_rec, new, flags=0, rec=None, par=None):
        keep, p = self.work(old, new)
        return LIB.pk_switch(self.mat, old, old_rec, new, flags, rec, p, par)


@settings(max_examples=120, deadline=None)
@given(shapes, dtypes, seeds, st.sampled_from(ISAS))
@example((63, 64, 1), F32, 0, ISAS[0])
def test_merge_is_close_and_unmerge_exact(shape, dtype, seed, name):
    n, k, r = shape
    rng = np.random.default_rng(seed)
    select(name)
    w = random(rng, (n, k), dtype, kind=rng.integers(4))
    parts = random_factors(rng, n, k, r, dtype, nf=int(rng.integers(1, 4)), size=rng.choice([0.05, 1.0]))
    d, weight, old = klib.lowrank(parts), Weight(w, dtype), w.copy()
    rec, plain = weight.record(), Weight(lay_out(old, 0).copy(), dtype)
    assert weight.merge(d, CHECK, rec) == OK
    assert plain.merge(d) == OK
    assert np.array_equal(bits(plain.w), bits(w)), "a record or strides changed the merged bits"
    exact = klib.widen(old, dtype) + dense(parts, n, k)
    total = np.abs(klib.widen(old, dtype)) + sum(
        abs(s) * np.abs(klib.widen(b, db)) @ np.abs(klib.widen(a, da)) for a, da, b, db, s in parts
    )
    acc = EPS[F64] if dtype == F64 else EPS[F32]
    bound = EPS[dtype] * np.abs(exact) + (3 * len(parts) * (r + 4)) * acc * total
    bound += 2.0**-25 if dtype == F16 else 0  # subnormals
    assert (np.abs(klib.widen(w, dtype) - exact) <= bound).all()
    select(ISAS[int(rng.integers(len(ISAS)))])
    assert weight.unmerge(d, rec) == OK
    assert np.array_equal(bits(w), bits(old))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(300, 1100, 16), (131, 513, 130), (1, 5000, 3), (5000, 1, 3), (4, 4, 512)])
def test_merge_large_and_threads(isa, dtype, shape):
    n, k, r = shape
    rng = np.random.default_rng(1)
    old = random(rng, (n, k), dtype)
    d = klib.lowrank(random_factors(rng, n, k, r, dtype, size=0.02))
    seen = []
    for threads in (1, 2, 3, 7):
        LIB.shim_threads(threads)
        weight = Weight(old.copy(), dtype)
        rec = weight.record()
        assert weight.merge(d, CHECK, rec, PAR) == OK
        seen.append(weight.w.copy())
        assert weight.unmerge(d, rec, PAR) == OK
        assert np.array_equal(bits(weight.w), bits(old))
    assert all(np.array_equal(bits(s), bits(seen[0])) for s in seen)


def test_fused_isas_agree():
    rng = np.random.default_rng(2)
    fused = [name for name in ISAS if name != "generic"]
    for dtype in DTYPES.values():
        old, d = random(rng, (50, 600), dtype), klib.lowrank(random_factors(rng, 50, 600, 19, F32))
        seen = []
        for name in fused:
            select(name)
            weight = Weight(old.copy(), dtype)
            assert weight.merge(d) == OK
            seen.append(bits(weight.w).copy())
        assert all(np.array_equal(s, seen[0]) for s in seen)
    select(ISAS[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_full_delta(isa, dtype):
    rng = np.random.default_rng(3)
    for n, k in [(1, 1), (40, 700), (33, 5)]:
        for kind in range(4):
            old = random(rng, (n, k), dtype, kind=kind)
            weight = Weight(old.copy(order="K"), dtype)
            full = random(rng, (n, k), dtype, 0.03, int(rng.integers(4)))
            d = klib.full(full, dtype, 0.5)
            want = klib.widen(old, dtype) + 0.5 * klib.widen(full, dtype)
            rec = weight.record()
            assert weight.merge(d, CHECK, rec) == OK
            assert (np.abs(klib.widen(weight.w, dtype) - want) <= 3 * EPS[dtype] * np.abs(want) + 3e-8).all()
            assert weight.unmerge(d, rec) == OK
            assert np.array_equal(bits(weight.w), bits(old))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_specials_round_trip(isa, dtype):
    """NaN payloads, infinities, -0, subnormals and overflow survive merge and unmerge."""
    rng = np.random.default_rng(4)
    raw = rng.integers(0, 2**63, (60, 530)).astype(f"u{klib.STORED[dtype]().itemsize}")
    raw[0, :4] = 0
    old = raw.view(klib.STORED[dtype])
    for size in (0.05, 1e3):
        parts = random_factors(rng, 60, 530, 4, dtype, size=size)
        if size > 1:
            parts[0][0][:, 7] = klib.narrow(np.full(4, np.inf), parts[0][1])
        d, weight = klib.lowrank(parts), Weight(old.copy(), dtype)
        rec = weight.record()
        assert weight.merge(d, 0, rec) == OK
        assert weight.unmerge(d, rec) == OK
        assert np.array_equal(bits(weight.w), bits(old))
        assert weight.merge(d, CHECK, rec) == NONFINITE
        assert np.array_equal(bits(weight.w), bits(old))


@pytest.mark.parametrize("factors", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("least", [-133, -112, -104, -101])
def test_tiny_values_are_rounded_alike(isa, factors, least):
    """bf16 values around the least normal one and sums of them that nearly cancel, with a record and without."""
    rng = np.random.default_rng(19)
    tiny = np.exp2(rng.uniform(least, least + 12, (12, 640))) * rng.choice([-1, 1], (12, 640))
    row = np.exp2(rng.uniform(least, least + 12, (1, 640)))
    tiny = np.where(rng.random(tiny.shape) < 0.5, tiny, -row * (1 + rng.uniform(-1, 1, tiny.shape) / 128))
    old, down = klib.narrow(tiny, BF16), klib.narrow(np.repeat(row, 4, 0), factors)
    up = klib.narrow(np.repeat([[1.0, 0, 0, 0]], 12, 0), factors)
    d, weight, plain = klib.lowrank([(down, factors, up, factors, 1.0)]), Weight(old.copy(), BF16), old.copy()
    rec = weight.record()
    assert weight.merge(d, CHECK, rec) == OK and Weight(plain, BF16).merge(d) == OK
    assert np.array_equal(bits(weight.w), bits(plain))
    if factors == F32:
        want = klib.narrow(klib.widen(old, BF16).astype(np.float32) + row.astype(np.float32), BF16)
        assert np.array_equal(bits(plain), bits(want))
    assert weight.unmerge(d, rec) == OK
    assert np.array_equal(bits(weight.w), bits(old))


def in_order(w, first, second):
    """The weight with two parts of it in each other's place, views of the same shape."""
    parts = (w[first].copy(), w[second].copy())
    w[first], w[second] = parts[1], parts[0]


REARRANGED = {
    "elements side by side": lambda w: in_order(w, np.s_[3, 8], np.s_[3, 9]),
    "elements a line apart": lambda w: in_order(w, np.s_[3, 0], np.s_[3, 64 // w.itemsize]),
    "elements four lines apart": lambda w: in_order(w, np.s_[3, 0], np.s_[3, 256 // w.itemsize]),
    "elements of neighbouring rows": lambda w: in_order(w, np.s_[0, 5], np.s_[1, 5]),
    "lines four apart": lambda w: in_order(
        w, np.s_[2, : 64 // w.itemsize], np.s_[2, 256 // w.itemsize : 320 // w.itemsize]
    ),
    "rows": lambda w: in_order(w, np.s_[0], np.s_[4]),
    "columns": lambda w: in_order(w, np.s_[:, 1], np.s_[:, 2]),
    "columns a segment apart": lambda w: in_order(w, np.s_[:, 1], np.s_[:, 65]),
    "all rows": lambda w: np.copyto(w, w[::-1].copy()),
    "all columns": lambda w: np.copyto(w, w[:, ::-1].copy()),
    "rolled": lambda w: np.copyto(w, np.roll(w, 64, axis=1)),
    "transposed": lambda w: np.copyto(w[:6, :6], w[:6, :6].T.copy()),
}


@pytest.mark.parametrize("how", REARRANGED)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_others_rearranged_is_seen(isa, dtype, how):
    rng = np.random.default_rng(13)
    weight = Weight(random(rng, (6, 512), dtype), dtype)
    rec = weight.record()
    d = klib.lowrank(random_factors(rng, 6, 512, 4, dtype))
    assert weight.merge(d, 0, rec) == OK
    merged = weight.w.copy()
    REARRANGED[how](weight.w)
    assert not np.array_equal(weight.w, merged)
    assert weight.unmerge(d, rec) == CHANGED


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_flipped_bit_and_pair_of_bits_is_seen(isa, dtype):
    """One bit anywhere; the sign of all; the same bit of two places, added in one and subtracted in the other."""
    rng = np.random.default_rng(14)
    weight = Weight(random(rng, (6, 512), dtype), dtype)
    rec = weight.record()
    d = klib.lowrank(random_factors(rng, 6, 512, 4, dtype))
    assert weight.merge(d, 0, rec) == OK
    merged, raw = weight.w.copy(), weight.w.view(f"u{weight.w.itemsize}")
    width = 8 * raw.itemsize
    raw ^= raw.dtype.type(1 << (width - 1))
    assert weight.unmerge(d, rec) == CHANGED
    for _ in range(2000):
        bit, (i, j), (p, q) = rng.integers(width), rng.integers((6, 512)), rng.integers((6, 512))
        one = raw.dtype.type(1 << int(bit))
        weight.w[...] = merged
        raw[i, j : j + 1] += one
        assert weight.unmerge(d, rec) == CHANGED
        if (i, j) != (p, q):
            weight.w[...] = merged
            raw[i, j : j + 1] += one
            raw[p, q : q + 1] -= one
            assert weight.unmerge(d, rec) == CHANGED
    weight.w[...] = merged
    assert weight.unmerge(d, rec) == OK


@pytest.mark.parametrize("with_record", [True, False])
def test_check_restores(isa, with_record):
    rng = np.random.default_rng(5)
    for dtype in DTYPES.values():
        for place in [(0, 0), (699, 1299), (350, 600)]:
            old = random(rng, (700, 1300), dtype)
            old[place] = klib.narrow(np.array([np.inf]), dtype)[0]
            weight = Weight(old.copy(), dtype)
            d = klib.lowrank(random_factors(rng, 700, 1300, 4, dtype))
            rec = weight.record() if with_record else None
            assert weight.merge(d, CHECK, rec, PAR) == NONFINITE
            assert np.array_equal(bits(weight.w), bits(old))


def test_unmerge_of_a_changed_weight_subtracts_there_only(isa):
    rng = np.random.default_rng(6)
    for dtype in DTYPES.values():
        old = random(rng, (64, 1500), dtype)
        parts = random_factors(rng, 64, 1500, 8, dtype)
        weight, d = Weight(old.copy(), dtype), klib.lowrank(parts)
        rec = weight.record()
        assert weight.merge(d, 0, rec) == OK
        merged = weight.w.copy()
        weight.w[10, 700] = klib.narrow(np.array([5.0]), dtype)[0]
        changed = weight.w.copy()
        assert weight.unmerge(d, rec) == CHANGED
        same = bits(weight.w) == bits(old)
        assert same[:6].all() and same[:, :512].all() and same[12:].all()
        want = klib.widen(changed, dtype) - dense(parts, 64, 1500)
        assert np.abs(klib.widen(weight.w, dtype) - want).max() < 0.05
        weight.w[...] = merged
        assert weight.unmerge(d, rec) == OK
        assert np.array_equal(bits(weight.w), bits(old))
        for broken in (0, 3, 20):  # a damaged or foreign head: plain subtraction, no crash
            weight.w[...] = merged
            copy = weight.record()
            C.memmove(copy.data, rec.data, rec.size)
            copy.size = rec.size
            C.memset(copy.data + broken, 0xEE, 4)
            assert weight.unmerge(d, copy) == CHANGED


def test_sign_flip_of_all_is_noticed(isa):
    rng = np.random.default_rng(7)
    w = random(rng, (128, 512), F32)
    weight, d = Weight(w, F32), klib.lowrank(random_factors(rng, 128, 512, 4, F32))
    rec = weight.record()
    assert weight.merge(d, 0, rec) == OK
    np.negative(w, out=w)
    assert weight.unmerge(d, rec) == CHANGED


@settings(max_examples=60, deadline=None)
@given(shapes, dtypes, seeds, st.sampled_from(ISAS))
def test_switch_equals_unmerge_merge(shape, dtype, seed, name):
    n, k, r = shape
    rng = np.random.default_rng(seed)
    select(name)
    old = random(rng, (n, k), dtype, kind=rng.integers(4))
    one, two = (klib.lowrank(random_factors(rng, n, k, max(r + e, 0), dtype)) for e in (0, 5))
    a, b = Weight(old.copy(order="K"), dtype), Weight(old.copy(order="K"), dtype)
    ra, rb = a.record(), b.record()
    assert a.merge(one, 0, ra) == OK and b.merge(one, 0, rb) == OK
    second, third = a.record(), b.record()
    assert a.switch(one, ra, two, int(rng.integers(2)), second) == OK
    assert b.unmerge(one, rb) == OK and b.merge(two, 0, third) == OK
    assert np.array_equal(bits(a.w), bits(b.w))
    assert second.size == third.size
    assert a.unmerge(two, second) == OK
    assert np.array_equal(bits(a.w), bits(old))
    select(ISAS[0])


def test_thousand_cycles_end_on_the_same_bits():
    rng = np.random.default_rng(8)
    for dtype in DTYPES.values():
        old = random(rng, (24, 130), dtype, 0.02)
        weight = Weight(old.copy(), dtype)
        deltas = [klib.lowrank(random_factors(rng, 24, 130, 4, F32, size=0.02)) for _ in range(3)]
        records = [weight.record(), weight.record()]
        for cycle in range(334):
            one, two = deltas[cycle % 3], deltas[(cycle + 1) % 3]
            assert weight.merge(one, 0, records[0]) == OK
            assert weight.switch(one, records[0], two, 0, records[1]) == OK
            assert weight.unmerge(two, records[1]) == OK
        assert np.array_equal(bits(weight.w), bits(old))


def decoded(code, shape, itemsize):
    """The differences of bits that the code of a unit of whole segments tells (record.h)."""
    found, at, end = np.zeros(shape, np.int64), 0, len(code)
    for j in range(0, shape[1], 64):
        for i in range(shape[0]):
            top, at = code[at], at + 1
            mask = 0
            for byte in range(8):
                if top >> byte & 1:
                    mask, at = mask | code[at] << 8 * byte, at + 1
            for bit in range(64):
                if mask >> bit & 1:
                    step, at = int(np.int8(np.uint8(code[at]))), at + 1
                    if step in (127, -128):
                        end -= itemsize
                        step = int.from_bytes(code[end : end + itemsize], "little", signed=True)
                    found[i, j + bit] = step
    assert at == end
    return found


def missed_by(old, delta, dtype):
    """The differences of bits that subtracting delta, after it was added, misses."""
    acc = np.float64 if dtype == F64 else np.float32
    merged = klib.narrow(klib.widen(old, dtype).astype(acc) + delta.astype(acc), dtype)
    back = klib.narrow(klib.widen(merged, dtype).astype(acc) - delta.astype(acc), dtype)
    return (bits(old) - bits(back)).view(f"i{old.itemsize}")


@pytest.mark.parametrize("factors", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_isas_code_alike_and_read_each_other(dtype, factors):
    """Differences at the ends of what a byte says, among which -127 is one that it says and -128 and 127 are not."""
    rng, many, shape = np.random.default_rng(20), 200_000, (6, 512)
    old = klib.narrow(np.exp2(rng.uniform(-9, 3, many)) * rng.choice([-1, 1], many), dtype)
    bits(old)[: many // 20] = rng.integers(120, 140, many // 20)  # subnormals
    delta = klib.widen(klib.narrow(np.exp2(rng.uniform(-1, 3, many)), BF16), BF16)
    missed = missed_by(old, delta, dtype)
    pick = rng.choice(np.flatnonzero(missed == 0), shape[0] * shape[1])
    ends = [rng.choice(np.flatnonzero(missed == by), 60) for by in (-128, -127, -126, 126, 127, 128)]
    pick[rng.permutation(pick.size)[:360]] = np.concatenate(ends)
    old, delta, missed = (a[pick].reshape(shape) for a in (old, delta, missed))
    up = klib.narrow(np.eye(shape[0]), factors)
    d, codes = klib.lowrank([(klib.narrow(delta, factors), factors, up, factors, 1.0)]), []
    for name in ISAS:
        weight = Weight(old.copy(), dtype)
        rec = weight.record()
        select(name)
        assert weight.merge(d, CHECK, rec) == OK
        codes.append(C.string_at(rec.data, rec.size)[72:])  # what follows the head, which names the arithmetic
        assert np.array_equal(decoded(codes[-1][16:], shape, old.itemsize), missed)
        merged = weight.w.copy()
        for other in ISAS:
            select(other)
            weight.w[...] = merged
            assert weight.unmerge(d, rec) == OK
            assert np.array_equal(bits(weight.w), bits(old)), (name, other)
    assert all(code == codes[0] for code in codes)
    select(ISAS[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [0.0, 0.0005, 0.003, 0.02])
@pytest.mark.parametrize("full", [False, True], ids=["low rank", "full"])
def test_record_holds_what_subtracting_misses(isa, dtype, size, full):
    rng = np.random.default_rng(15)
    head, shape = 72 + 16, (6, 512)  # bytes before a record's only unit
    old = random(rng, shape, dtype, 0.02)
    row = random(rng, (1, shape[1]), F32, size)
    ones = np.ones((shape[0], 1), np.float32)
    d = klib.full(np.broadcast_to(row, shape), F32) if full else klib.lowrank([(row, F32, ones, F32, 1.0)])
    weight = Weight(old.copy(), dtype)
    rec = weight.record()
    assert weight.merge(d, 0, rec) == OK
    missed = missed_by(old, row, dtype)
    data = C.string_at(rec.data, rec.size)[head:]
    if len(data) == old.nbytes:
        assert data == old.tobytes()
    else:
        assert np.array_equal(decoded(data, shape, old.itemsize), missed)
    assert weight.unmerge(d, rec) == OK
    assert np.array_equal(bits(weight.w), bits(old))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_in_a_factor(isa, dtype):
    """NaNs of any bits, in a few columns: merged as NaN, refused under CHECK, taken out to the old bits."""
    rng = np.random.default_rng(16)
    old = random(rng, (13, 640), dtype, 0.02)
    a, b = random(rng, (3, 640), F32), random(rng, (13, 3), F32)
    raw = np.array([0xFFFFFFFF, 0x7FFFFFFF, 0x7FC08001, 0x7F800001, 0xFFC00000], np.uint32)
    a[1, [0, 77, 300, 301, 639]] = raw.view(np.float32)
    d, weight = klib.lowrank([(a, F32, b, F32, 1.0)]), Weight(old.copy(), dtype)
    rec = weight.record()
    assert weight.merge(d, CHECK, rec) == NONFINITE
    assert np.array_equal(bits(weight.w), bits(old))
    assert weight.merge(d, 0, rec) == OK
    wrong = ~np.isfinite(klib.widen(weight.w, dtype))
    assert (wrong == np.isnan(a[1])).all()
    plain = Weight(old.copy(), dtype)
    assert plain.merge(d) == OK
    assert np.array_equal(bits(plain.w)[~wrong], bits(weight.w)[~wrong])
    assert np.isnan(klib.widen(plain.w, dtype)[wrong]).all()
    assert weight.unmerge(d, rec) == OK
    assert np.array_equal(bits(weight.w), bits(old))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_record_size(isa, dtype):
    """At most 6 % of the weight's bytes at |delta| = 2.5 % of |W|; never more than the bound; small ones overflow."""
    rng = np.random.default_rng(9)
    n, k, r = 512, 1024, 8
    old = random(rng, (n, k), dtype, 0.02)
    a, b = random(rng, (r, k), F32, 1.0), random(rng, (n, r), F32, 0.02 * 0.025 / r**0.5)
    d, weight = klib.lowrank([(a, F32, b, F32, 1.0)]), Weight(old.copy(), dtype)
    rec = weight.record()
    assert weight.merge(d, 0, rec) == OK
    assert rec.size <= 0.06 * old.nbytes
    assert weight.unmerge(d, rec) == OK
    for capacity in (0, 100, rec.size // 2, rec.size - 1):
        small = Weight(weight.w, dtype, capacity)
        assert small.merge(d, 0, small.record(), PAR) == FULL_RECORD
        assert np.array_equal(bits(weight.w), bits(old))
        assert weight.merge(d, 0, rec) == OK
        merged = weight.w.copy()
        assert small.switch(d, rec, d, 0, small.record()) == FULL_RECORD
        assert np.array_equal(bits(weight.w), bits(merged))
        assert weight.unmerge(d, rec) == OK
    huge = klib.lowrank([(a, F32, b, F32, 1e6)])
    assert weight.merge(huge, 0, rec) == OK
    assert rec.size <= LIB.pk_record_bound(weight.mat)
    assert weight.unmerge(huge, rec) == OK
    assert np.array_equal(bits(weight.w), bits(old))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(3000, 12), (200, 600), (61, 1100)])
def test_a_record_of_any_threads_fits_into_the_bound(dtype, shape, threads):
    """Units coded and copied side by side: threads take more than they need, but never more than copies would."""
    rng = np.random.default_rng(18)
    n, k = shape
    old = random(rng, shape, dtype, 0.02)
    b = random(rng, (n, 2), F32, 0.001)
    b[rng.random(n) < 0.2] *= 1e6
    d, weight = klib.lowrank([(random(rng, (2, k), F32), F32, b, F32, 1.0)]), Weight(old.copy(), dtype)
    alone, rec = weight.record(), weight.record()
    LIB.shim_threads(threads)
    assert weight.merge(d, 0, alone) == OK and weight.unmerge(d, alone) == OK
    assert weight.merge(d, 0, rec, PAR) == OK
    assert alone.size <= rec.size <= weight.capacity
    assert weight.unmerge(d, rec, PAR) == OK
    assert np.array_equal(bits(weight.w), bits(old))


def rounding_between(isa, *between):
    """Relative error of what is rounded between two products of these types: pairs of bf16 take bf16 only."""
    return EPS[BF16] if isa == "avx512bf16" and set(between) == {BF16} else 0.0


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), shapes, dtypes, seeds, st.sampled_from(ISAS))
@example(17, (70, 130, 12), BF16, 1, ISAS[0])
def test_forward(m, shape, dtype, seed, name):
    n, k, r = shape
    rng = np.random.default_rng(seed)
    select(name)
    dy = dtype if rng.integers(4) else int(rng.integers(4))
    x, y = random(rng, (m, k), dtype, kind=rng.integers(4)), random(rng, (m, n), dy, kind=rng.integers(4))
    parts = random_factors(rng, n, k, r, dtype, nf=int(rng.integers(1, 3)), size=0.3)
    rank, old = sum(p[0].shape[0] for p in parts), y.copy()
    td = F64 if F64 in (dtype, dy) else F32
    t = np.zeros((m, rank), klib.STORED[td])
    f = klib.factors(parts)
    args = klib.mat(y, dy), klib.mat(x, dtype), f, len(parts)
    keep, p = klib.buffer(LIB.pk_lowrank_apply_work(*args))
    assert LIB.pk_lowrank_apply(*args, klib.mat(t, td), p, PAR if rng.integers(2) else None) == OK
    xf = klib.widen(x, dtype)
    wide = F64 in (dtype, dy)
    acc = EPS[F64 if wide and dy == F64 else F32]
    want, total, at, extra = klib.widen(old, dy), np.abs(klib.widen(old, dy)), 0, 0
    for a, da, b, db, s in parts:
        af, bf = klib.widen(a, da), klib.widen(b, db)
        assert np.allclose(t[:, at : at + len(a)], xf @ af.T, rtol=1e-5, atol=1e-4)
        at += len(a)
        want = want + s * (xf @ af.T) @ bf.T
        total = total + s * (np.abs(xf) @ np.abs(af).T) @ np.abs(bf).T
        extra = extra + rounding_between(name, dtype, db, dy) * s * np.abs(xf @ af.T) @ np.abs(bf).T
    bound = 1.01 * EPS[dy] * (np.abs(want) + extra) + (k + 3 * rank + 9) * acc * total + extra
    bound += 2.0**-25 if dy == F16 else 0
    assert (np.abs(klib.widen(y, dy) - want) <= bound).all()
    blank, filled = np.zeros_like(y), lay_out(np.full_like(y, 7), 3)
    args = klib.mat(blank, dy), klib.mat(x, dtype), f, len(parts)
    keep, p = klib.buffer(LIB.pk_lowrank_apply_work(*args))
    assert LIB.pk_lowrank_apply(*args, None, p, PAR) == OK
    assert LIB.pk_lowrank_set(klib.mat(filled, dy), *args[1:], None, p, PAR) == OK
    assert np.array_equal(klib.widen(filled, dy), klib.widen(blank, dy))
    one = old[:1].copy()
    args = klib.mat(one, dy), klib.mat(x[:1].copy(), dtype), f, len(parts)
    keep, p = klib.buffer(LIB.pk_lowrank_apply_work(*args))
    assert LIB.pk_lowrank_apply(*args, None, p, None) == OK
    assert np.array_equal(bits(one), bits(y[:1])), "a row depends on the others"
    select(ISAS[0])


def look_up(y, dy, ids, f, count, par=None):
    keep, p = klib.buffer(LIB.pk_lookup_apply_work(klib.mat(y, dy), f, count))
    return LIB.pk_lookup_apply(klib.mat(y, dy), ids.ctypes.data, f, count, p, par)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), shapes, dtypes, seeds, st.sampled_from(ISAS))
@example((64), (1200, 9, 8), F32, 0, ISAS[0])
def test_lookup(m, shape, dtype, seed, name):
    """The term of an embedding: columns of A, one for each row; a row is the same alone, and with any threads."""
    n, k, r = shape
    rng = np.random.default_rng(seed)
    select(name)
    y, ids = random(rng, (m, n), dtype, kind=rng.integers(4)), rng.integers(0, k, m)
    parts = random_factors(rng, n, k, r, dtype, nf=int(rng.integers(0, 3)), size=0.3)
    f, old = klib.factors(parts), y.copy()
    for threads in (1, 3):
        LIB.shim_threads(threads)
        y[...] = old
        assert look_up(y, dtype, ids, f, len(parts), PAR) == OK
        if threads == 1:
            first = y.copy()
    assert np.array_equal(bits(y.copy()), bits(first))
    want, total, rank = klib.widen(old, dtype), np.abs(klib.widen(old, dtype)), 0
    for a, da, b, db, s in parts:
        af, bf, rank = klib.widen(a, da)[:, ids].T, klib.widen(b, db), rank + len(a)
        want, total = want + s * af @ bf.T, total + s * np.abs(af) @ np.abs(bf).T
    bound = EPS[dtype] * np.abs(want) + (3 * rank + 9) * EPS[F64 if dtype == F64 else F32] * total
    assert (np.abs(klib.widen(y, dtype) - want) <= bound + (2.0**-25 if dtype == F16 else 0)).all()
    one = old[-1:].copy()
    assert look_up(one, dtype, ids[-1:].copy(), f, len(parts)) == OK
    assert np.array_equal(bits(one), bits(y[-1:].copy())), "a row depends on the others"
    if parts:
        assert LIB.pk_lookup_apply(klib.mat(y[:, :0], dtype), ids.ctypes.data, f, 1, None, None) == klib.EINVAL
    select(ISAS[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m,n,k,r", [(1, 256, 256, 16), (8, 300, 1000, 130), (200, 520, 515, 64), (37, 1, 1, 512)])
def test_forward_sizes_and_threads(isa, dtype, m, n, k, r):
    rng = np.random.default_rng(10)
    x, y0 = random(rng, (m, k), dtype), random(rng, (m, n), dtype)
    parts = random_factors(rng, n, k, r, dtype, size=0.05)
    f, seen = klib.factors(parts), []
    for threads in (1, 3):
        LIB.shim_threads(threads)
        y = y0.copy()
        args = klib.mat(y, dtype), klib.mat(x, dtype), f, 1
        keep, p = klib.buffer(LIB.pk_lowrank_apply_work(*args))
        assert LIB.pk_lowrank_apply(*args, None, p, PAR) == OK
        seen.append(bits(y).copy())
    assert np.array_equal(*seen)
    want = klib.widen(y0, dtype) + klib.widen(x, dtype) @ dense(parts, n, k).T
    assert np.abs(klib.widen(y, dtype) - want).max() <= (EPS[dtype] * 1.01) * np.abs(want).max() + 1e-3


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 220) | st.integers(510, 530),
    st.tuples(st.integers(1, 300), st.integers(1, 600), st.integers(0, 20)),
    st.sampled_from([F32, BF16, F16]),
    seeds,
    st.sampled_from(ISAS),
)
def test_linear_layers(m, shape, dtype, seed, name):
    """Base layer and terms at once, and the gradient of its input; any strides, row by row, whatever the threads."""
    n, k, r = shape
    rng = np.random.default_rng(seed)
    select(name)
    x, w, bias = (random(rng, s, dtype, kind=rng.integers(4)) for s in ((m, k), (n, k), (1, n)))
    bias = bias if rng.integers(2) else None
    parts = random_factors(rng, n, k, r, dtype, nf=int(rng.integers(3)), size=0.3) if rng.integers(4) else []
    f, rank = klib.factors(parts), sum(p[0].shape[0] for p in parts)
    xf, wf, t = klib.widen(x, dtype), klib.widen(w, dtype), np.zeros((m, rank), np.float32)
    want, total, extra, seen = xf @ wf.T, np.abs(xf) @ np.abs(wf).T, 0, []
    if bias is not None:
        want, total = want + klib.widen(bias, dtype), total + np.abs(klib.widen(bias, dtype))
    for a, da, b, db, s in parts:
        af, bf = klib.widen(a, da), klib.widen(b, db)
        want, total = want + s * (xf @ af.T) @ bf.T, total + s * (np.abs(xf) @ np.abs(af).T) @ np.abs(bf).T
        extra = extra + rounding_between(name, dtype, db) * s * np.abs(xf @ af.T) @ np.abs(bf).T

    def run(x, par, t=None):
        y = np.zeros((len(x), n), klib.STORED[dtype])
        args = klib.mat(y, dtype), klib.mat(x, dtype), klib.mat(w, dtype)
        keep, p = klib.buffer(LIB.pk_linear_work(*args, f, len(parts)))
        assert LIB.pk_linear(*args, klib.mat(bias, dtype), f, len(parts), klib.mat(t, F32), p, par) == OK
        return y

    for threads in (1, 3):
        LIB.shim_threads(threads)
        seen.append(run(x, PAR, t))
    assert np.array_equal(bits(seen[0]), bits(seen[1]))
    tiny = 2.0**-25 if dtype == F16 else 0
    bound = 1.01 * EPS[dtype] * (np.abs(want) + extra) + (k + 3 * rank + 9) * EPS[F32] * total + extra + tiny
    assert (np.abs(klib.widen(seen[0], dtype) - want) <= bound).all()
    if rank:
        assert np.allclose(t, np.hstack([xf @ klib.widen(p[0], p[1]).T for p in parts]), rtol=1e-5, atol=1e-4)
    if m:
        x[1:] = klib.narrow(np.full((1, k), 3.0), dtype)
        assert np.array_equal(bits(run(x, None)[:1]), bits(seen[0][:1])), "a row depends on the others"

    turned = [(b.T, db, a.T, da, s) for a, da, b, db, s in parts]
    f, g, u = klib.factors(turned), random(rng, (m, n), dtype, kind=rng.integers(4)), np.zeros((m, rank), np.float32)
    gf, seen = klib.widen(g, dtype), []
    want, total, extra = gf @ wf, np.abs(gf) @ np.abs(wf), 0
    for down, db, up, da, s in turned:
        df, uf = klib.widen(down, db), klib.widen(up, da)
        want, total = want + s * (gf @ df.T) @ uf.T, total + s * (np.abs(gf) @ np.abs(df).T) @ np.abs(uf).T
        extra = extra + rounding_between(name, dtype, da) * s * np.abs(gf @ df.T) @ np.abs(uf).T
    for threads in (1, 3):
        LIB.shim_threads(threads)
        dx = random(rng, (m, k), dtype, kind=rng.integers(2))
        args = klib.mat(dx, dtype), klib.mat(g, dtype), klib.mat(w.T, dtype)
        keep, p = klib.buffer(LIB.pk_linear_work(*args, f, len(parts)))
        assert LIB.pk_linear(*args, None, f, len(parts), klib.mat(u, F32), p, PAR) == OK
        bound = 1.01 * EPS[dtype] * (np.abs(want) + extra) + (n + 3 * rank + 9) * EPS[F32] * total + extra + tiny
        assert (np.abs(klib.widen(dx, dtype) - want) <= bound).all()
        seen.append(bits(dx).copy())
    assert np.array_equal(*seen)
    if rank:
        assert np.allclose(u, np.hstack([gf @ klib.widen(p[0], p[1]).T for p in turned]), rtol=1e-5, atol=1e-4)
    select(ISAS[0])


def test_linear_layers_refuse(isa):
    x, w, y = np.zeros((65, 4), np.float32), np.zeros((3, 4), np.float32), np.zeros((65, 3), np.float32)
    mats = klib.mat(y, F32), klib.mat(x, F32), klib.mat(w, F32)
    space = np.zeros(10**5, np.uint8)
    work = space.ctypes.data
    assert LIB.pk_linear(mats[0], mats[0], mats[2], None, None, 0, None, work, None) == EINVAL
    bias = np.zeros((1, 4), np.float32)
    assert LIB.pk_linear(*mats, klib.mat(bias, F32), None, 0, None, work, None) == EINVAL
    assert LIB.pk_linear(*mats, None, None, 0, None, work, None) == OK
    assert not LIB.pk_linear_suits(F32, 193, 256, 256) and not LIB.pk_linear_suits(F64, 1, 256, 256)
    assert not LIB.pk_linear_suits(F32, 8, 64, 64)
    assert bool(LIB.pk_linear_suits(F32, 8, 256, 256)) == isa.startswith("avx")
    assert bool(LIB.pk_linear_grad_suits(F16, 500, 10, 10)) == isa.startswith("avx")
    assert bool(LIB.pk_linear_suits(BF16, 10**6, 256, 256)) == (isa == "avx2")
    assert not LIB.pk_linear_grad_suits(F64, 8, 1024, 1024) and not LIB.pk_linear_suits(BF16, 8, 64, 64)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), shapes, dtypes, seeds, st.sampled_from(ISAS))
@example(151, (70, 130, 60), BF16, 1, ISAS[0])
@example(151, (70, 130, 60), BF16, 2, ISAS[0])
def test_backward(m, shape, dtype, seed, name):
    n, k, r = shape
    rng = np.random.default_rng(seed)
    select(name)
    (a, da, b, _, s), *_ = random_factors(rng, n, k, r, dtype, size=0.3)
    g, x = (random(rng, (m, c), dtype, kind=rng.integers(4)) for c in (n, k))
    gf, xf, af, bf = klib.widen(g, dtype), klib.widen(x, dtype), klib.widen(a, da), klib.widen(b, da)
    dx, dA, dB = random(rng, (m, k), dtype), random(rng, (r, k), da), random(rng, (n, r), da, kind=rng.integers(2))
    dx0, add = klib.widen(dx, dtype), int(rng.integers(2))
    t = (xf @ af.T).astype(np.float64 if dtype == F64 else np.float32) if rng.integers(2) else None
    tm = klib.mat(t, F64 if dtype == F64 else F32) if t is not None and t.size else klib.Mat()
    given = (gf @ bf).astype(np.float64 if dtype == F64 else np.float32) if rng.integers(2) else None
    um = klib.mat(given, F64 if dtype == F64 else F32) if given is not None and given.size else klib.Mat()
    mats = klib.mat(g, dtype), klib.mat(x, dtype), tm, um, klib.factors([(a, da, b, da, s)])[0]
    asked = klib.mat(dx, dtype) if given is None else klib.Mat()
    q = klib.Backward(*mats, asked, klib.mat(dA, da), klib.mat(dB, da), add)
    keep, p = klib.buffer(LIB.pk_lowrank_backward_work(C.byref(q)))
    assert LIB.pk_lowrank_backward(C.byref(q), p, PAR) == OK
    for got, dt, want, size, between in [
        (
            dx if given is None else None,
            dtype,
            add * dx0 + s * gf @ bf @ af,
            np.abs(gf) @ np.abs(bf) @ np.abs(af) * s + np.abs(add * dx0),
            s * np.abs(gf @ bf) @ np.abs(af),
        ),
        (
            dA,
            da,
            s * (gf @ bf).T @ xf,
            (np.abs(gf) @ np.abs(bf)).T @ np.abs(xf) * s,
            s * np.abs(gf @ bf).T @ np.abs(xf),
        ),
        (
            dB,
            da,
            s * gf.T @ (xf @ af.T),
            np.abs(gf).T @ (np.abs(xf) @ np.abs(af).T) * s,
            s * np.abs(gf).T @ np.abs(xf @ af.T),
        ),
    ]:
        if got is None:
            continue
        acc = EPS[F64 if dtype == F64 and dt == F64 else F32]
        extra = rounding_between(name, dtype, da) * between
        bound = 1.01 * EPS[dt] * (np.abs(want) + extra) + (n + k + m + 3 * r + 9) * acc * size + extra
        bound += 2.0**-24 if dt == F16 else 0
        assert (np.abs(klib.widen(got, dt) - want) <= bound).all()
    select(ISAS[0])


def test_finite(isa):
    rng = np.random.default_rng(12)
    for dtype in DTYPES.values():
        for shape in [(0, 4), (1, 1), (3, 40001), (129, 257)]:
            for kind in range(4):
                a = random(rng, shape, dtype, kind=kind)
                assert LIB.pk_finite(klib.mat(a, dtype), PAR) == 1
                for bad in (np.nan, np.inf, -np.inf):
                    if a.size:
                        i = tuple(int(rng.integers(s)) for s in shape)
                        keep, a[i] = a[i].copy(), klib.narrow(np.array([bad]), dtype)[0]
                        assert LIB.pk_finite(klib.mat(a, dtype), PAR) == 0
                        a[i] = keep


def test_rounding_of_every_half():
    """Each ISA rounds to bf16 and f16 as numpy does, at and around all ties."""
    h = np.arange(0x7C00, dtype=np.uint16)
    for dtype, ties in [(F16, h.view(np.float16).astype(np.float64)), (BF16, klib.widen(h, BF16))]:
        mid = np.concatenate([ties[:-1], (ties[:-1] + ties[1:]) / 2])
        values = np.concatenate([mid, np.nextafter(mid, 1e9, dtype=np.float64), -mid]).astype(np.float32)[None, :]
        want = klib.narrow(values, dtype)
        for name in ISAS:
            select(name)
            w = klib.narrow(np.zeros_like(values), dtype)
            assert Weight(w, dtype).merge(klib.full(values, F32)) == OK
            same = (bits(w) == bits(want)) | (values == 0)
            assert same.all(), (name, values[~same][:4], bits(w)[~same][:4])
            tiles = np.repeat(np.zeros_like(w), 7, axis=0)
            d = klib.lowrank([(values, F32, np.ones((7, 1), np.float32), F32, 1.0)])
            assert Weight(tiles, dtype).merge(d) == OK
            assert ((bits(tiles) == bits(w)) | (values == 0)).all(), name
    select(ISAS[0])


def test_empty_and_invalid(isa):
    e = np.zeros((0, 5), np.float32)
    weight, d = (
        Weight(e, F32),
        klib.lowrank([(np.zeros((2, 5), np.float32), F32, np.zeros((0, 2), np.float32), F32, 1)]),
    )
    rec = weight.record()
    assert weight.merge(d, CHECK, rec) == OK and weight.unmerge(d, rec) == OK
    w = np.ones((3, 5), np.float32)
    weight = Weight(w, F32)
    assert weight.merge(d) == EINVAL
    assert weight.merge(klib.full(np.zeros((3, 4), np.float32), F32)) == EINVAL
    bad = klib.Mat(None, 3, 5, 5, 1, F32)
    assert LIB.pk_finite(bad, None) == EINVAL
    assert LIB.pk_merge(klib.Mat(w.ctypes.data, 3, 5, 5, 1, 9), d, 0, None, None, None) == EINVAL
    assert LIB.pk_isa_select(b"nonsense") == -1
    assert (w == 1).all()


def test_parallel_failure_is_reported():
    fails = C.CFUNCTYPE(C.c_int32, C.c_int64, C.c_int64, C.c_int64, C.c_void_p, C.c_void_p)(lambda *a: 1)
    weight = Weight(np.ones((600, 600), np.float32), F32)
    assert weight.merge(klib.full(np.ones((600, 600), np.float32), F32), 0, None, C.cast(fails, C.c_void_p)) == -2
