"""Functions of PEFT's modules that methods are made of: the same names at the same paths, the same numbers."""

import importlib

import pytest
import torch

import peft_c
from tests.rooms.cases import network

peft = pytest.importorskip("peft")


def both(path):
    return [importlib.import_module(f"{package}.tuners.{path}") for package in ("peft_c", "peft")]


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 8), (3, 2, 5)])
def test_circulant(shape):
    w = torch.randn(shape)
    ours, theirs = (module.get_circulant_fast(w) for module in both("c3a.utils"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wavelet", ["db1", "db3", "sym4", "coif1"])
@pytest.mark.parametrize("axes", [(-2, -1), (-1, -2)])
def test_wavelet_reconstruction(wavelet, axes):
    ours, theirs = both("waveft.waverec2d")
    size = 6 + ours.LENGTHS[wavelet]
    low, *details = (torch.randn(2, size, size + 3) for _ in range(4))
    levels = [low, tuple(details)]
    torch.testing.assert_close(
        ours.waverec2d(levels, wavelet, axes), theirs.waverec2d(levels, wavelet, axes), atol=1e-4, rtol=1e-4
    )


def test_subspaces():
    pytest.importorskip("sklearn")
    ours, theirs = both("adamss.utils")
    tensor = torch.randn(2, 1, 12, 8)
    for mine, other in zip(
        ours.slice_pca(tensor, 3, "cpu", random_seed=4), theirs.slice_pca(tensor, 3, "cpu", random_seed=4), strict=True
    ):
        torch.testing.assert_close(mine, other)
    (left, count), (right, expected) = (module.clustering_Z(tensor[0, 0], 4, 10) for module in (ours, theirs))
    assert count == expected and torch.equal(left, right)
    mine, other = (module.seg_locations(left) for module in (ours, theirs))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    assert ours.get_trainable_subspaces(3) == theirs.get_trainable_subspaces(3)


@pytest.mark.parametrize("path", ["ia3.bnb", "adalora.bnb", "adalora.gptq", "boft.fbd", "waveft.wavelet", "osf.utils"])
def test_paths(path):
    assert importlib.import_module(f"peft_c.tuners.{path}")


@pytest.mark.parametrize("first", [["2"], ["0"]])
def test_frods_second_adapter_has_places_of_its_own_where_it_has_other_targets(first, tmp_path):
    outputs = []
    for package in (peft_c, peft):
        base, x = network("Linear")
        torch.manual_seed(1)
        config = dict(sparse_rate=0.1, init_weights=False, save_projection=False, progressbar=False)
        model = package.get_peft_model(base, package.FrodConfig(target_modules=first, **config))
        model.add_adapter("more", package.FrodConfig(target_modules=["0", "2"], **config))
        model.set_adapter("more")
        outputs.append(model.eval()(x))
        model.save_pretrained(tmp_path / package.__name__, selected_adapters=["more"])
        again = package.PeftModel.from_pretrained(network("Linear")[0], tmp_path / package.__name__ / "more").eval()
        if first == ["2"]:
            torch.testing.assert_close(again(x), outputs[-1])
    if first == ["2"]:  # else PEFT changes what the first layer has been made with
        torch.testing.assert_close(*outputs)
