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


@pytest.mark.parametrize("wavelet", ["haar", "db1", "db3", "sym4", "coif1"])
@pytest.mark.parametrize("axes", [(-2, -1), (-1, -2)])
def test_wavelet_reconstruction(wavelet, axes):
    ours, theirs = both("waveft.waverec2d")
    size = 6 + len(both("waveft.wavelet")[1].Wavelet(wavelet))
    low, *details = (torch.randn(2, size, size + 3) for _ in range(4))
    levels = [low, tuple(details)]
    expected = theirs.waverec2d(levels, wavelet, axes)
    for given in (wavelet, both("waveft.wavelet")[0].Wavelet(wavelet)):
        torch.testing.assert_close(ours.waverec2d(levels, given, axes), expected, atol=1e-4, rtol=1e-4)


def test_wavelets():
    ours, theirs = both("waveft.wavelet")
    assert set(theirs.wavelist()) - set(ours.wavelist()) == {"coif5"}  # its filters in PEFT have a wrong length
    for name in ("Haar", *ours.wavelist()):
        mine, other = (module.Wavelet(name) for module in (ours, theirs))
        assert (repr(mine), len(mine), mine.dec_len, mine.rec_len) == (
            repr(other), len(other), other.dec_len, other.rec_len
        )  # fmt: skip
        for left, right in zip(mine.filter_bank, other.filter_bank, strict=True):
            assert left == pytest.approx(right, abs=1e-9)
        for part in ("dec_lo", "dec_hi", "rec_lo", "rec_hi"):
            assert getattr(mine, part) == pytest.approx(getattr(other, part), abs=1e-9)
    with pytest.raises(ValueError, match="Unknown wavelet name 'db0'"):
        ours.Wavelet("db0")


def test_the_router_of_poly_is_one():
    for module in both("poly.router"):
        assert issubclass(module.PolyRouter, module.Router) and module.Router is not module.PolyRouter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [(24, 3, 2, 1), (24, 3, 2, 0), (24, 2, 4, 2), (18, 2, 3, 1), (8, 1, 4, 1)])
def test_butterflies(order):
    ours, theirs = (
        package.get_peft_model(network("Linear")[0], package.BOFTConfig(target_modules=["0"])).base_model.model[0]
        for package in (peft_c, peft)
    )
    indices = theirs.block_butterfly_perm(*order)
    assert torch.equal(ours.block_butterfly_perm(*order), indices)
    assert torch.equal(ours.perm2mat(indices), theirs.perm2mat(indices))
    blocks = torch.randn(3, 4, 4)
    torch.testing.assert_close(ours.cayley_batch(blocks), theirs.cayley_batch(blocks))
    with pytest.raises(ValueError, match="Invalid number of blocks"):
        ours.block_butterfly_perm(8, 2, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "factors"), [*(("Linear", n) for n in (1, 2, 3)), ("Conv2d", 1), ("Conv2d", 2)])
def test_layers_of_boft_take_a_forward_that_was_written_for_peft(kind, factors, monkeypatch):
    """As Gaudi's, which read the permutations and call the Cayley transform of the layer."""
    ours, theirs = both("boft.layer")
    monkeypatch.setattr(theirs, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(theirs, "FastBlockDiag", ours.FastBlockDiag)
    layers, x = [], network(kind)[1]
    for package in (peft_c, peft):
        options = {"boft_block_size": 2, "boft_n_butterfly_factor": factors, "init_weights": False}
        torch.manual_seed(0)
        config = package.BOFTConfig(target_modules=["0"], **options)
        layers.append(package.get_peft_model(network(kind)[0], config).base_model.model[0])
    assert torch.equal(layers[0].boft_P, layers[1].boft_P)
    layer = getattr(theirs, kind)
    torch.testing.assert_close(layer.forward(layers[0], x), layers[0](x))
    torch.testing.assert_close(layers[0](x), layers[1](x))
    for mine, other in zip(
        layer.get_delta_weight(layers[0], "default"), layers[0].get_delta_weight("default"), strict=True
    ):
        torch.testing.assert_close(mine, other)


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


PATHS = """
adalora.bnb adalora.gptq boft.fbd hira.bnb ia3.bnb osf.utils pvera.bnb randlora.bnb road.bnb waveft.constants
""".split()


@pytest.mark.parametrize("path", PATHS)
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
