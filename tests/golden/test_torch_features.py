"""What programs do with a model through torch: mixed precision, shapes out of the ordinary, memory formats, export."""

import warnings

import pytest
import torch

import peft_c
from tests.rooms.cases import METHODS, NO_MERGE, PAIRS, call, kinds_of, layers, make, network, same, weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = [method for method in METHODS if "Linear" in kinds_of(method)]
# where PEFT raises, or the output for one row depends on the others
NO_SINGLE_ROW = {"adamss", "gralora", "lily", "poly"}
NO_EMPTY = {"adamss", "c3a", "gralora", "poly"}


def close(left, right, tolerance=1e-4):
    return torch.allclose(left.float(), right.float(), atol=tolerance * max(1.0, right.abs().max().item()), rtol=0)


@pytest.mark.parametrize("method", [method for method in LINEAR if method not in ("poly", "fourierft")])
def test_autocast(method):
    found = []
    for package in (peft_c, peft):
        model, x = make(method, package=package).train(), network("Linear")[1]
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = call(model, method, x)
        output.float().square().sum().backward()
        found.append((output.dtype, output, {name for name, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] is found[1][0] and close(found[0][1], found[1][1], 3e-2)
    assert found[0][2] == {name for name in found[1][2] if "ranknum" not in name}


@pytest.mark.parametrize("method", [method for method in LINEAR if method not in NO_SINGLE_ROW])
def test_one_row_without_a_batch(method):
    model, x = make(method), network("Linear")[1]
    assert close(model(x[0, 0]), model(x)[0, 0])
    assert close(torch.func.vmap(model)(x), model(x))


@pytest.mark.parametrize("method", [method for method in LINEAR if method not in NO_EMPTY])
def test_no_rows(method):
    model, x = make(method), network("Linear")[1]
    for empty in (x[:0], x[0, :0]):
        output = model(empty)
        assert output.shape == (*empty.shape[:-1], 8)
        output.sum().backward()


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[1] in ("Conv2d", "Conv3d")])
def test_channels_last(method, kind):
    layout = torch.channels_last if kind == "Conv2d" else torch.channels_last_3d
    model, x = make(method, kind), network(kind)[1]
    wanted = model(x)
    model, x = model.to(memory_format=layout), x.to(memory_format=layout)
    before = weights(model)
    assert close(model(x), wanted)
    if method in NO_MERGE:
        return
    model.merge_adapter()
    assert close(model(x), wanted, 1e-3)
    model.unmerge_adapter()
    assert same(weights(model), before)
    assert all(weight.stride() == old.stride() for weight, old in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
def test_torch_is_told_of_every_module(kind):
    found = []
    for package in (peft_c, peft):
        names = []
        hook = torch.nn.modules.module.register_module_module_registration_hook(
            lambda owner, name, module, names=names: names.append((type(owner).__name__, name, type(module).__name__))
        )
        try:
            make("lora", kind, package=package)
        finally:
            hook.remove()
        found.append([entry for entry in names if "base_layer" in entry or "lora_" in entry[1]])
    assert found[0] == found[1] and len(found[0]) >= 7


@pytest.mark.parametrize("method", ["loha", "hira", "glora"])
def test_export(method):
    model, x = make(method), network("Linear")[1]
    assert close(torch.export.export(model, (x,), strict=False).module()(x), model(x))


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("method", ["c3a", "fourierft", "frod", "lokr", "randlora", "shira", "vera", "waveft"])
def test_export_for_any_number_of_rows(method, graph):
    model, x = make(method).base_model.model, network("Linear")[1]
    with torch.set_grad_enabled(graph):
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=False)
    for rows in (x[:2], x.repeat(60, 1, 1)):
        assert close(exported.module()(rows), model(rows))


def test_a_layer_alone_becomes_half_precision():
    model = make("fourierft")
    model.base_model.model[0].half()
    assert {p.dtype for p in model.base_model.model[0].parameters()} == {torch.float16}


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("method", ["waveft", "lily", "hra"])
def test_one_graph(method):
    model, x = make(method), network("Linear")[1]
    torch.compiler.reset()
    assert close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_forward_mode_through_osf():
    model, x = make("osf"), network("Linear")[1]
    assert close(torch.func.jvp(model, (x,), (torch.zeros_like(x),))[0], model(x))


@pytest.mark.parametrize("targets", ["all-linear", ["0"]])
@pytest.mark.parametrize("layers", [{"layers_to_transform": [0]}, {"layers_pattern": "h"}])
@pytest.mark.parametrize("kind", [kind for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING if kind != "ADALORA"])
def test_options_that_go_with_a_list_of_targets(kind, layers, targets):
    raised = []
    for package in (peft_c, peft):
        config = getattr(package, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__)
        known = config.__dataclass_fields__
        if "layers_pattern" not in known:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config(target_modules=targets, **layers)
                raised.append(None)
            except ValueError:
                raised.append(ValueError)
    assert raised[0] is raised[1]


def test_layers_that_return_more_than_a_tensor():
    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x), x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm(4)

        def forward(self, x):
            return self.norm(x)[0]

    model = peft_c.get_peft_model(Net(), peft_c.LNTuningConfig(target_modules=["norm"]))
    assert model(torch.randn(2, 4)).shape == (2, 4)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_gloo_available():
        pytest.skip("no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["lora", "loha", "hira", "ia3"])
def test_sharded_weights(one_process, method):
    from torch.distributed.fsdp import fully_shard

    model, x = make(method), network("Linear")[1]
    for layer in layers(model):
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        wanted = model(x)
        before = [weight.full_tensor() for weight in weights(model)]
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
            assert same([weight.full_tensor() for weight in weights(model)], before)
        with model.disable_adapter():
            assert torch.equal(model(x), base)


def test_the_second_process_has_no_part_of_ranknum():
    dist = pytest.importorskip("torch.distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("fake", store=fake.FakeStore(), rank=1, world_size=2)
    try:
        model = make("adalora")
        fully_shard(model)
        model.merge_adapter()
        assert [layer.merged_adapters for layer in layers(model)] == [["default"]] * len(layers(model))
    finally:
        dist.destroy_process_group()
