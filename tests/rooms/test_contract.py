"""What every method has to keep, whichever it is: a new room is tested by a row in CASES."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import peft_c
from peft_c.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_c.tuners.room import Room
from peft_c.tuners.tuners_utils import BaseTunerLayer

# method -> options with which a new adapter changes the output of layers "0" (16, 32) and "2" (32, 8)
CASES = {
    "adalora": {"r": 4, "init_lora_weights": False, "total_step": 10},
    "beft": {"init_weights": False},
    "boft": {"boft_block_size": 4, "init_weights": False},
    "c3a": {"block_size": 4, "init_weights": False},
    "deft": {"r": 4, "init_weights": False},
    "delora": {"r": 4, "init_weights": False},
    "fourierft": {"n_frequency": 40},
    "frod": {"init_weights": False},
    "glora": {"r": 4, "init_weights": False},
    "gralora": {"r": 8, "alpha": 8, "init_weights": False},
    "hira": {"r": 4, "init_weights": False},
    "hra": {"r": 4, "init_weights": False},
    "ia3": {"init_ia3_weights": False, "feedforward_modules": ["2"]},
    "lily": {"r": 4, "stride_A": 1, "num_B": 2, "init_weights": False},
    "loha": {"r": 4, "init_weights": False},
    "lokr": {"r": 2, "init_weights": False},
    "lora": {"r": 4, "init_lora_weights": False},
    "miss": {"r": 4, "init_weights": False},
    "oft": {"oft_block_size": 4, "r": 0, "init_weights": False},
    "osf": {"init_weights": False},
    "peanut": {"r": 4, "depth": 0, "act_fn": "relu", "init_weights": False},
    "psoft": {"r": 4, "psoft_alpha": 4, "init_weights": False},
    "pvera": {"r": 4, "init_weights": False},
    "randlora": {"r": 4, "randlora_alpha": 1, "init_weights": False},
    "road": {"group_size": 2, "init_weights": False},
    "shira": {"r": 2, "init_weights": False},
    "tinylora": {"r": 2, "u": 16, "init_weights": "uniform"},
    "unilora": {"r": 4, "theta_d_length": 101, "init_weights": False},
    "vblora": {"r": 4, "vector_length": 4, "num_vectors": 10, "init_weights": False},
    "vera": {"r": 4, "init_weights": False},
    "waveft": {"n_frequency": 16, "init_weights": False},
}
NO_MERGE = {"lily"}  # the paper's method depends on the input; PEFT's merge raises as well
ONE_ADAPTER = {"adalora", "osf"}  # methods that allow one trainable adapter
NO_UNMERGE = {"osf"}  # as in PEFT
OTHER_GRADIENTS = {"c3a"}  # PEFT's hand-written gradient of the input is wrong: it fails torch's gradcheck
RANDOM_FORWARD = {"pvera"}  # draws at every forward unless told otherwise
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def config_of(method, package=peft_c):
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
    cls = cls if package is peft_c else getattr(package, cls.__name__)
    known = inspect.signature(cls).parameters
    return cls(target_modules=["0", "2"], **{k: v for k, v in CASES[method].items() if k in known})


def base_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype)


def make(method, package=peft_c):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = package.get_peft_model(base_model(), config_of(method, package))
        disturb(model, package)
    return model.eval()


def disturb(model, package=peft_c):
    """Moves parameters that are zero or one at the start in every setting, the same way in both packages."""
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def weights(model):
    return [t.detach().clone() for layer in layers(model) for t in layer.get_base_layer().parameters()]


def run(model, x=X):
    torch.manual_seed(7)
    with torch.no_grad():
        return model(x)


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


each = pytest.mark.parametrize("method", sorted(CASES))
mergeable = pytest.mark.parametrize("method", sorted(set(CASES) - NO_MERGE - NO_UNMERGE))


@each
def test_parameters_outputs_and_gradients_equal_peft(method):
    peft = pytest.importorskip("peft")
    ours, theirs = make(method), make(method, peft)
    left, right = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert sorted(left) == sorted(right)
    assert {n for n, p in left.items() if p.requires_grad} == {n for n, p in right.items() if p.requires_grad}
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert torch.allclose(run(ours), run(theirs), atol=1e-4, rtol=1e-4)
    if method in RANDOM_FORWARD | OTHER_GRADIENTS:
        return
    for model in (ours, theirs):
        model(X).square().sum().backward()
    for name in left:
        if right[name].grad is not None:
            assert torch.allclose(left[name].grad, right[name].grad, atol=1e-3, rtol=1e-3), name


@each
def test_the_adapter_acts_and_can_be_disabled(method):
    model, plain = make(method), run(base_model())
    assert not torch.allclose(run(model), plain, atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(run(model), plain, atol=1e-5)


@mergeable
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_keeps_the_output_and_unmerge_every_bit(method, safe_merge):
    model = make(method)
    expected, before = run(model), weights(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert method in RANDOM_FORWARD or torch.allclose(run(model), expected, atol=1e-4, rtol=1e-4)
    assert all(layer.merged for layer in layers(model))
    disturb(model)  # training while merged does not matter
    model.unmerge_adapter()
    assert same(weights(model), before)


@mergeable
def test_nothing_changes_when_one_layer_is_broken(method):
    model = make(method)
    before = weights(model)
    last = layers(model)[-1]
    for name in last.adapter_layer_names:
        container = getattr(last, name)
        for parameter in container.parameters() if isinstance(container, nn.Module) else ():
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert same(weights(model), before)
    assert not any(layer.merged for layer in layers(model))


@pytest.mark.parametrize("method", sorted(set(CASES) - ONE_ADAPTER))
def test_two_adapters_switch_and_delete(method):
    model = make(method)
    first = run(model)
    torch.manual_seed(11)
    model.add_adapter("other", config_of(method))
    model.set_adapter("other")
    disturb(model)
    second = run(model)
    assert not torch.allclose(first, second, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    model.delete_adapter("other")
    assert torch.equal(run(model), first)
    assert not [name for name, _ in model.named_parameters() if ".other" in name]


@each
def test_files_both_ways(method, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = make(method), make(method, peft)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        read_by_peft = peft.PeftModel.from_pretrained(base_model(), tmp_path / "ours").eval()
        read_by_us = peft_c.PeftModel.from_pretrained(base_model(), tmp_path / "theirs").eval()
    assert torch.allclose(run(read_by_peft), run(theirs), atol=1e-4, rtol=1e-4)
    assert torch.allclose(run(read_by_us), run(ours), atol=1e-4, rtol=1e-4)


@each
def test_deepcopy_and_pickle(method):
    model = make(method)
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), expected)


@mergeable
def test_a_copy_of_a_merged_model_unmerges(method):
    model = make(method)
    before = weights(model)
    model.merge_adapter()
    clone = copy.deepcopy(model)
    clone.unmerge_adapter()
    assert same(weights(clone), before)


@each
def test_dtype_moves(method):
    model = make(method).to(torch.bfloat16)
    assert run(model, X.to(torch.bfloat16)).dtype is torch.bfloat16


def test_every_room_has_a_case():
    for config in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        method = getattr(config, "method", None)
        if method is not None:
            assert method in CASES or method in {"ln_tuning", "poly", "xlora", "adamss", "supertuning", "shadow"}, (
                method
            )


def test_rooms_leave_the_work_to_the_base():
    """No room writes merging, injection or a layer's forward of its own."""
    forbidden = {"merge", "unmerge", "update_layer", "delete_adapter", "forward"}
    found = []
    for method in CASES:
        if method == "lora":
            continue
        module = __import__(f"peft_c.tuners.{method}", fromlist=["_"])
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, Room) and cls.__module__ == module.__name__:
                found += [f"{cls.__qualname__}.{name}" for name in forbidden & vars(cls).keys()]
    assert not found
