"""TensorView: what C sees of tensors and arrays, and every trap refused with its own message."""

import ctypes

import numpy as np
import pytest
import torch

from peft_c import _C

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_tensors(dtype):
    t = torch.zeros(4, 6, 3, dtype=dtype)[1:, ::2].transpose(0, 2)
    d = _C.describe(t)
    assert d["data"] == t.data_ptr() and d["dtype"] == str(dtype).removeprefix("torch.")
    assert d["shape"] == tuple(t.shape) and d["strides"] == t.stride() and d["numel"] == t.numel()
    assert d["writable"] and not d["read_only"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numpy_arrays(dtype):
    a = np.zeros((4, 6), dtype)[::-1, 1::2]
    d = _C.describe(a)
    assert d["data"] == a.ctypes.data and d["shape"] == (4, 3) and d["dtype"] == np.dtype(dtype).name
    assert d["strides"] == tuple(s // a.itemsize for s in a.strides)


def test_requires_grad_parameter_and_subclass_are_fine():
    p = torch.nn.Parameter(torch.zeros(3))
    assert _C.describe(p)["data"] == p.data_ptr()
    assert _C.describe(p * 2)["shape"] == (3,)

    class Sub(torch.Tensor):
        pass

    s = torch.zeros(2, 2).as_subclass(Sub)
    assert _C.describe(s)["data"] == s.data_ptr()


def test_zero_size_and_zero_dim():
    d = _C.describe(torch.zeros(0, 5))
    assert d["data"] == 0 and d["shape"] == (0, 5) and d["numel"] == 0
    scalar = torch.tensor(3.0)
    d = _C.describe(scalar)
    assert d["shape"] == () and d["strides"] == () and d["numel"] == 1 and d["data"] == scalar.data_ptr()
    assert _C.describe(np.zeros((0, 3), np.float32))["data"] == 0
    assert _C.describe(np.array(1.0))["shape"] == ()


def test_size_one_dims_keep_odd_strides():
    t = torch.zeros(12).as_strided((1, 3), (7, 1))
    assert _C.describe(t, True)["strides"] == (7, 1)


def refused(obj, error, match, write=False):
    with pytest.raises(error, match=match):
        _C.describe(obj, write)


def test_conjugate_and_negative_bit():
    refused(torch.zeros(3, dtype=torch.complex64).conj(), ValueError, "conjugate bit.*resolve_conj")
    refused(torch.zeros(3, dtype=torch.complex64), TypeError, "unsupported dtype")
    refused(torch._neg_view(torch.ones(3)), ValueError, "negative bit.*resolve_neg")
    imaginary = torch.ones(3, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    refused(imaginary, ValueError, "negative bit")


def test_fake_and_wrapper_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    refused(fake, TypeError, "FakeTensor.*has no data")

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    refused(Wrapper(torch.zeros(3)), TypeError, "has no data")
    freed = torch.zeros(3)
    freed.untyped_storage().resize_(0)
    refused(freed, TypeError, "has no data")


def test_functional_tensors():
    fn = torch._to_functional_tensor(torch.zeros(3))
    refused(fn, TypeError, "has no data|no strided storage")


def test_functorch_tensors():
    def under_transform(t):
        refused(t, TypeError, "torch.func transform")
        return (t * t).sum()

    torch.func.grad(under_transform)(torch.ones(3))
    torch.vmap(under_transform)(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.zeros(3, device="meta"), "meta device"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8), "quantized"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided), "nested"),
    ],
    ids=["meta", "sparse", "csr", "quantized", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_layouts_without_plain_storage(make, match):
    refused(make(), TypeError, match)


def test_mkldnn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without mkldnn")
    refused(torch.eye(3).to_mkldnn(), TypeError, "mkldnn")


def test_expanded_tensors_are_read_not_written():
    t = torch.zeros(3, 1).expand(3, 4)
    assert _C.describe(t)["strides"] == (1, 0) and not _C.describe(t)["writable"]
    refused(t, ValueError, "share memory", write=True)
    refused(torch.zeros(9).as_strided((3, 3), (1, 1)), ValueError, "share memory", write=True)
    refused(torch.zeros(9).as_strided((3, 3), (2, 1)), ValueError, "share memory", write=True)
    assert _C.describe(torch.zeros(9).as_strided((3, 3), (1, 3)), True)["writable"]
    assert _C.describe(np.zeros(6, np.float32)[::-2], True)["strides"] == (-2,)


def test_misaligned():
    raw = torch.zeros(17, dtype=torch.uint8)
    start = 1 if raw.data_ptr() % 4 == 0 else 0
    odd = torch.frombuffer(bytearray(17), dtype=torch.float32, count=4, offset=1)
    if odd.data_ptr() % 4:
        refused(odd, ValueError, "not aligned")
    array = np.zeros(17, np.uint8)[start : start + 16].view(np.float32)
    if array.ctypes.data % 4:
        refused(array, ValueError, "not aligned")
    packed = np.zeros(3, np.dtype([("a", np.uint8), ("b", np.float32)]))["b"]
    refused(packed, ValueError, "not aligned")
    assert _C.describe(packed.copy())["shape"] == (3,)


def test_lanes():
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("torch without fp4")
    refused(torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), TypeError, "lanes != 1")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype):
    refused(torch.zeros(3).to(dtype), TypeError, "unsupported dtype; float32")


def test_unsupported_arrays():
    refused(np.zeros(3, np.int32), TypeError, "unsupported dtype")
    refused(np.zeros(3, object), TypeError, "unsupported dtype")
    other = ">f4" if np.dtype("<f4").isnative else "<f4"
    refused(np.zeros(3, other), ValueError, "byte order")
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    assert _C.describe(array)["read_only"]
    refused(array, ValueError, "read-only", write=True)
    refused(np.broadcast_to(np.zeros(3, np.float32), (2, 3)), ValueError, "read-only|share memory", write=True)


def test_no_array_and_too_many_dims():
    for obj in (None, 3, "x", [1.0, 2.0], torch.nn.Linear(2, 2), torch.float32):
        refused(obj, TypeError, "is no tensor or array")
    assert _C.describe(torch.zeros([1] * 16))["numel"] == 1
    refused(torch.zeros([1] * 17), ValueError, "more than 16 dimensions")
    refused(np.zeros([1] * 17, np.float32), ValueError, "more than 16 dimensions")


# ------------------------------------------------------------------------------------------------- other producers


class Array:
    """A producer that is neither torch nor numpy."""

    def __init__(self, tensor, versioned=True):
        self.tensor, self.versioned, self.asked = tensor, versioned, None

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **kwargs):
        self.asked = kwargs
        if not self.versioned and kwargs:
            raise TypeError("no arguments")
        return self.tensor.__dlpack__(**({"max_version": (1, 0)} if self.versioned else {}))


@pytest.mark.parametrize("versioned", [True, False])
def test_other_producers(versioned):
    t = torch.arange(6.0).reshape(2, 3)
    producer = Array(t, versioned)
    d = _C.describe(producer, True)
    assert d["data"] == t.data_ptr() and d["shape"] == (2, 3) and d["strides"] == (3, 1)
    assert t.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_read_only_producer():
    array = np.zeros(4, np.float32)
    array.flags.writeable = False

    class Producer:
        def __dlpack__(self, **kwargs):
            return array.__dlpack__(**kwargs)

    assert _C.describe(Producer())["read_only"]
    refused(Producer(), ValueError, "read-only", write=True)


def test_producer_errors_pass_through():
    class Broken:
        def __dlpack__(self, **kwargs):
            raise RuntimeError("not today")

    class Liar:
        def __dlpack__(self, **kwargs):
            return "no capsule"

    refused(Broken(), RuntimeError, "not today")
    with pytest.raises(ValueError):
        _C.describe(Liar())


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


class HandMade:
    """A capsule written by hand: device, lanes, version and NULL strides as one likes."""

    def __init__(self, major=1, device=1, lanes=1, bits=32, offset=0):
        self.buffer = (ctypes.c_float * 12)(*range(12))
        self.shape = (ctypes.c_int64 * 2)(3, 4 - offset // 4)
        deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.freed)
        self.deleter, self.deleted = deleter, 0
        tensor = DLTensor(ctypes.addressof(self.buffer), device, 0, 2, 2, bits, lanes, self.shape, None, offset)
        address = ctypes.cast(deleter, ctypes.c_void_p)
        self.managed = Versioned(major, 0, None, address, 0, tensor)

    def freed(self, _):
        self.deleted += 1

    def __dlpack__(self, **kwargs):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor_versioned", None)


def test_hand_made_capsules():
    plain = HandMade(offset=4)
    d = _C.describe(plain)
    assert d["strides"] == (3, 1) and d["data"] == ctypes.addressof(plain.buffer) + 4
    assert plain.deleted == 1
    for bad, error, match in [
        (HandMade(device=2), ValueError, "not on the CPU"),
        (HandMade(lanes=2), TypeError, "lanes != 1"),
        (HandMade(bits=8), TypeError, "unsupported dtype"),
        (HandMade(major=2), BufferError, "DLPack 2.0 is not supported"),
    ]:
        refused(bad, error, match)
        assert bad.deleted == 1, "the producer's tensor must be freed exactly once"


def test_copy_on_write_is_materialised():
    t = torch.ones(4)
    lazy = torch._lazy_clone(t)
    assert _C.describe(lazy)["data"] != _C.describe(t)["data"]
