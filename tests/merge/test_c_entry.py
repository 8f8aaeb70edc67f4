"""`_C.merge_add` and `_C.merge_subtract` by themselves: what they take, what they refuse, what they return."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from peft_c import _C
from peft_c.tuners.products import accumulate


def factors(n, k, r=3, dtype=torch.float32):
    return torch.randn(r, k, dtype=dtype), torch.randn(n, r, dtype=dtype)


def test_values_for_matrices_stacks_and_full_deltas():
    torch.manual_seed(0)
    for shape in ((7, 5), (3, 7, 5), (0, 5), (7, 0), (1, 1)):
        n, k = shape[-2:]
        stack = shape[:-2]
        weight = torch.randn(shape, dtype=torch.float64)
        A, B = torch.randn(*stack, 2, k, dtype=torch.float64), torch.randn(*stack, n, 2, dtype=torch.float64)
        for operands, delta in (([(A, B, 0.5)], 0.5 * (B @ A)), (full := torch.randn(shape), full.double())):
            w = weight.clone()
            finite, record = _C.merge_add(w, operands, False, True, w)
            assert finite is True and all(isinstance(part, bytearray) for part in record)
            assert len(record) == (stack[0] if stack else 1)
            torch.testing.assert_close(w, weight + delta)
            assert _C.merge_subtract(w, operands, record, w) is True
            assert torch.equal(w, weight)
            assert _C.merge_add(w, operands, False, False, w) == (True, None)
            assert _C.merge_subtract(w, operands, None, w) is True
            torch.testing.assert_close(w, weight)


def test_a_stack_with_one_bad_matrix_is_left_alone():
    torch.manual_seed(0)
    for bad in range(4):
        w = torch.randn(4, 6, 5)
        before = w.clone()
        A, B = torch.randn(4, 2, 5), torch.randn(4, 6, 2)
        B[bad, 0, 0] = float("nan")
        assert _C.merge_add(w, [(A, B, 1.0)], True, True, w) == (False, None)
        assert torch.equal(w, before)


def test_what_c_refuses_to_do():
    A, B = factors(6, 5)
    plain = torch.randn(6, 5)
    operands = [(A, B, 1.0)]

    class Sub(torch.Tensor):
        pass

    refused = [
        torch.zeros(6, 5, dtype=torch.int32),
        torch.zeros(6, 5, dtype=torch.complex64),
        torch.zeros(6, 5, device="meta"),
        torch.zeros(1, 5).expand(6, 5),
        torch.zeros(6, 5).as_subclass(Sub),
        torch.zeros(6, 5).to_sparse(),
        torch.zeros(30),
    ]
    for weight in refused:
        assert _C.merge_add(weight, operands, False, False, weight) is None
        assert _C.merge_subtract(weight, operands, None, weight) is None
    for bad in (A.to(torch.int32), A.to("meta"), A.as_subclass(Sub), A[None]):
        assert _C.merge_add(plain, [(bad, B, 1.0)], False, False, plain) is None
    assert _C.merge_add(plain, plain, False, False, plain) is None  # its own memory
    from torch.utils._python_dispatch import TorchDispatchMode

    with TorchDispatchMode():
        assert _C.merge_add(plain, operands, False, False, plain) is None


def test_errors():
    A, B = factors(6, 5)
    w = torch.zeros(6, 5)
    for operands, error in (
        ([(A.T, B, 1.0)], ValueError),
        ([(A, B.T, 1.0)], ValueError),
        ([(A, B)], TypeError),
        ([(A, B, "1")], TypeError),
        ([], ValueError),
        (torch.zeros(5, 6), ValueError),
    ):
        with pytest.raises(error):
            _C.merge_add(w, operands, False, False, w)
    with pytest.raises(TypeError):
        _C.merge_add(w)
    with pytest.raises(TypeError):
        _C.merge_subtract(w, [(A, B, 1.0)], 3, w)
    with pytest.raises(TypeError):
        _C.merge_subtract(w, [(A, B, 1.0)], (3,), w)
    assert torch.equal(w, torch.zeros(6, 5)) and w._version == 0


def test_a_foreign_or_cut_record_is_not_trusted():
    torch.manual_seed(0)
    A, B = factors(40, 30)
    w = torch.randn(40, 30)
    before = w.clone()
    _, record = _C.merge_add(w, [(A, B, 0.1)], False, True, w)
    merged = w.clone()
    for odd in ((b"",), (b"x" * 100,), (record[0][:-1],), (record[0][:20],), record * 2, ()):
        w.copy_(merged)
        assert _C.merge_subtract(w, [(A, B, 0.1)], odd, w) is False
        torch.testing.assert_close(w, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_exchange(dtype):
    torch.manual_seed(0)
    for shape, order in (
        ((7, 5), (0, 1)),
        ((130, 101), (1, 0)),
        ((3, 4, 5, 6), (0, 2, 3, 1)),
        ((0, 3), (0, 1)),
        ((), ()),
    ):
        w = torch.randn(shape, dtype=dtype).permute(order)
        for add in (False, True):
            other = torch.randn(shape, dtype=dtype).permute(order)
            before, wanted = w.clone(), w + other if add else other.clone()
            version, digest = w._version, _C.digest(w)
            assert _C.exchange(w, other, add, True, w) == (True, _C.digest(wanted))
            assert torch.equal(w, wanted) and torch.equal(other, before) and w._version == version + 1
            assert _C.digest(other) == digest
            assert not w.numel() or _C.digest(w) != digest


def test_exchange_of_what_is_not_finite():
    for bad in (float("nan"), float("inf"), float("-inf")):
        for add in (False, True):
            w = torch.randn(100, 99)
            before, other = w.clone(), torch.randn(100, 99)
            other[57, 3] = bad
            assert _C.exchange(w, other.clone(), add, True, w) == (False, 0)
            assert torch.equal(w, before)
            assert _C.exchange(w, other.clone(), add, False, w)[0] is True
            assert not torch.isfinite(w).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_restore_exchanges_what_has_the_digest(dtype):
    torch.manual_seed(0)
    for shape in ((301, 207), (5,), (0, 3)):
        w, other = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        before, after, version = other.clone(), w.clone(), w._version
        digest = _C.digest(w)
        assert _C.restore(w, other, digest, w) is True
        assert torch.equal(w, before) and torch.equal(other, after) and w._version == version + 1
        assert _C.restore(w, other, digest + 1, w) is False
        assert torch.equal(w, before) and torch.equal(other, after)
    w = torch.ones(2, 3, dtype=dtype)
    assert _C.restore(w, w, 0, w) is None and _C.restore(w, torch.ones(3, 2, dtype=dtype), 0, w) is None
    with pytest.raises(TypeError):
        _C.restore(w, other, "0", w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (130, 301), (3000, 7), (3, 4, 5, 6), (0, 3), (1, 20000), (5, 2688)])
def test_combine_with_vectors(dtype, shape):
    torch.manual_seed(0)
    for multiply in (False, True):
        for dim in range(len(shape)):
            for kind in (dtype, torch.float64 if dtype == torch.float64 else torch.float32):
                w, values = torch.randn(shape).to(dtype), torch.randn(shape[dim]).to(kind)
                before, old, version = w.clone(), torch.empty_like(w), w._version
                along = values.view(-1, *(1 for _ in shape[dim + 1 :]))
                wanted = (w * along if multiply else w + along).to(dtype)
                run = max(1, torch.Size(shape[dim + 1 :]).numel())
                finite, digest = _C.combine(w, old, values, run, multiply, None, True, w)
                assert finite and (multiply or digest == _C.digest(wanted))
                assert torch.equal(w, wanted) and torch.equal(old, before) and w._version == version + 1
                undo = partial(_C.uncombine, w, old, values, run) if multiply else partial(_C.restore, w, old)
                if w.numel():
                    wanted.view(-1)[-1] = w.view(-1)[-1] = 1000.0
                    assert undo(digest, w) is False and torch.equal(w, wanted) and torch.equal(old, before)
                    w.view(-1)[-1:] = (before * along if multiply else before + along).to(dtype).view(-1)[-1:]
                assert undo(digest, w) is True and torch.equal(w, before)


@pytest.mark.parametrize("places_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_combine_at_places(dtype, places_dtype):
    torch.manual_seed(0)
    for count in (0, 1, 1000, 40000):
        w = torch.randn(300, 200).to(dtype)
        places = torch.randperm(w.numel())[:count].to(places_dtype)
        values, old, before = torch.randn(count).to(dtype), torch.empty(count, dtype=dtype), w.clone()
        wanted = w.flatten().index_add(0, places, values)
        finite, digest = _C.combine(w, old, values, 1, False, places, True, w)
        assert finite and digest == _C.digest(wanted[places.long()])
        assert torch.equal(w.flatten(), wanted) and torch.equal(old, before.flatten()[places.long()])
        assert _C.restore(w, old, digest + 1, w, places) is False and torch.equal(w.flatten(), wanted)
        assert _C.restore(w, old, digest, w, places) is True and torch.equal(w, before)
        assert torch.equal(old, wanted[places.long()])


def test_combine_of_what_is_not_finite_and_what_it_refuses():
    w, places, old = torch.randn(6, 5), torch.tensor([3, 29, 7]), torch.empty(3)
    before, values = w.clone(), torch.tensor([1.0, float("nan"), 2.0])
    assert _C.combine(w, old, values, 1, False, places, True, w) == (False, 0) and torch.equal(w, before)
    assert _C.combine(w, torch.empty(6, 5), torch.full((5,), float("inf")), 1, True, None, True, w) == (False, 0)
    assert torch.equal(w, before)
    for outside, kind in (
        (30, "int"),
        (-1, "int"),
        (-(2**31), "int"),
        (2**31 - 1, "int"),
        (30, "long"),
        (2**40, "long"),
    ):
        for at in ([0, outside, 1], [outside, -1, 0]):
            with pytest.raises(IndexError, match="outside of the weight"):
                _C.combine(w, old, torch.ones(3), 1, False, getattr(torch.tensor(at), kind)(), False, w)
    with pytest.raises(IndexError):
        _C.combine(w, torch.empty(6, 5), torch.ones(5), 0, True, None, False, w)
    for refused in (
        (w, old[:2], torch.ones(3), 1, False, places),
        (w.T, old, torch.ones(3), 1, False, places),
        (w, old, torch.ones(3).double(), 1, False, places),
        (w, old, old, 1, False, places),
        (w, old, torch.ones(3), 1, False, places.float()),
        (w, old, torch.ones(3), 1, False, torch.arange(6)[::2]),
        (w, torch.empty(5, 6), torch.ones(5), 1, True, None),
    ):
        assert _C.combine(*refused, False, w) is None
    assert torch.equal(w, before)
    with pytest.raises(TypeError, match="hashes"):
        _C.uncombine(w, torch.empty(6, 5), torch.ones(5), 1, b"other", w)
    for function in (_C.combine, _C.uncombine):
        with pytest.raises(TypeError):
            function(w, old)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_accumulate(dtype, inference):
    torch.manual_seed(0)
    for kind in (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.bfloat16, torch.float16):
        for shape, own in (
            ((3, 70, 1000), (3, 70, 1000)),
            ((7, 5), (5,)),
            ((40, 3001), (3001,)),
            ((0, 4), (4,)),
            ((), ()),
        ):
            for multiply in (False, True):
                with torch.inference_mode(inference):
                    y, values = torch.randn(shape).to(dtype), torch.randn(own).to(kind)
                    wide = torch.promote_types(dtype, torch.float32)
                    wanted = (y.to(wide) * values if multiply else y.to(wide) + values).to(dtype)
                    before = values.clone()
                    assert _C.accumulate(y, values, multiply) is True
                    assert torch.equal(y, wanted) and torch.equal(values, before)
                    assert inference or y._version == 1


def test_what_accumulate_refuses():
    y, leaf = torch.randn(4, 6), torch.zeros(4, 6, requires_grad=True)
    before = y.clone()
    for values in (y, y[0], torch.ones(4), torch.ones(4, 1), torch.ones(1, 6), torch.ones(()), torch.ones(6, 4).T, 3):
        assert _C.accumulate(y, values, False) is False
    assert _C.accumulate(y, torch.ones(4, 6).double(), False) is False
    assert _C.accumulate(y.T, torch.ones(6, 4), False) is False
    assert _C.accumulate(y.to_sparse(), torch.ones(4, 6), False) is False
    assert torch.equal(y, before)
    with pytest.raises(TypeError):
        _C.accumulate(y, y)
    assert accumulate(y, torch.ones(4, 1)).equal(before + 1)
    assert accumulate(y.double(), torch.ones(6), True).equal(y.double())
    (accumulate(leaf * 2, torch.full((4, 6), 3.0).bfloat16(), True)).sum().backward()
    assert leaf.grad.equal(torch.full((4, 6), 6.0))


def test_what_exchange_refuses():
    w = torch.randn(6, 5)
    before = w.clone()
    for other in (
        w,
        w[:, :],
        torch.randn(5, 6).T,
        torch.randn(6, 5).double(),
        torch.randn(5, 6),
        torch.randn(12, 5)[::2],
    ):
        assert _C.exchange(w, other, False, False, w) is None
    assert _C.exchange(w[:, :3], torch.randn(6, 3), False, False, w) is None
    assert _C.digest(w[:, :3]) is None and _C.digest(w.to_sparse()) is None and _C.digest(w.int()) is None
    from torch.utils._python_dispatch import TorchDispatchMode

    other = torch.randn(6, 5)
    with TorchDispatchMode():
        assert _C.exchange(w, other, False, False, w) is None
    assert torch.equal(w, before)
    with pytest.raises(TypeError):
        _C.exchange(w, w)


def test_digests_do_not_depend_on_threads():
    torch.manual_seed(0)
    w, threads = torch.randn(301, 207), torch.get_num_threads()
    try:
        digests = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            digests.add(_C.digest(w))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_versions_and_threads():
    torch.manual_seed(0)
    A, B = factors(300, 200, 8)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            w = torch.ones(300, 200)
            version = w._version
            _, record = _C.merge_add(w, [(A, B, 0.3)], True, True, w)
            assert w._version == version + 1
            results.append((w, record))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(w, results[0][0]) for w, _ in results)
    assert _C.merge_subtract(results[2][0], [(A, B, 0.3)], results[0][1], results[2][0]) is True
    assert torch.equal(results[2][0], torch.ones(300, 200))


LEAK_ROUNDS = """
import gc, sys, torch
from peft_c import _C
from peft_c.tuners.products import accumulate

A, B, w, scale = torch.randn(4, 48), torch.randn(64, 4), torch.randn(64, 48), 0.25
operands, bad = [(A, B, scale)], [(A.T, B, scale)]

def rounds(count):
    for _ in range(count):
        _, record = _C.merge_add(w, operands, True, True, w)
        _C.merge_subtract(w, operands, record, w)
        try:
            _C.merge_add(w, bad, True, True, w)
        except ValueError:
            continue
        raise SystemExit("factors that do not fit were taken")

rounds(1000)
counts = [sys.getrefcount(item) for item in (A, B, w, scale, operands)]
gc.collect()
blocks = sys.getallocatedblocks()
rounds(10_000)
gc.collect()
assert [sys.getrefcount(item) for item in (A, B, w, scale, operands)] == counts
assert sys.getallocatedblocks() - blocks < 1000, sys.getallocatedblocks() - blocks
"""


def test_nothing_leaks():
    done = subprocess.run([sys.executable, "-c", LEAK_ROUNDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7, 130), (300, 200)])
def test_finite(dtype, shape):
    x = torch.randn(shape).to(dtype)
    assert _C.finite(x) is True
    for value in (float("nan"), float("inf"), -float("inf")) if x.numel() else ():
        y = x.clone()
        y.view(-1)[-1] = value
        assert _C.finite(y) is _C.finite(y.T if y.ndim == 2 else y) is False
    assert _C.finite(torch.randn(4, 6).to(dtype)[:, ::2]) is None
    assert _C.finite(torch.arange(3)) is None
