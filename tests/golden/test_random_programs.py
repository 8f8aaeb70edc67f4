"""Random programs of public calls, run with peft_c and with the installed peft: the same outputs, names, flags, files
and kinds of error after each call. What docs/numerics.md lists as different is not called."""

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import peft_c

peft = pytest.importorskip("peft")

NAMES = ["default", "other", "third"]
X = torch.arange(12).reshape(4, 3) % 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.emb(ids)
        return self.head(self.conv(x + self.down(torch.tanh(self.up(x)))))


targets = st.lists(st.sampled_from(["emb", "up", "down", "conv", "head"]), min_size=1, unique=True).map(sorted)
low_rank = {"target_modules": targets, "r": st.sampled_from([1, 2, 4])}
configs = st.one_of(
    st.tuples(
        st.just("LoraConfig"),
        st.fixed_dictionaries(
            {**low_rank, "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal"])},
            optional={
                "lora_alpha": st.sampled_from([1, 16]),
                "use_rslora": st.just(True),
                "use_dora": st.just(True),
                "rank_pattern": st.just({"up": 3}),
                "alpha_pattern": st.just({"^down": 5}),
                "exclude_modules": st.just(["up"]),
                "modules_to_save": st.just(["head"]),
                "trainable_token_indices": st.just({"emb": [1, 3]}),
            },
        ),
    ),
    st.tuples(st.just("LoHaConfig"), st.fixed_dictionaries({**low_rank, "init_weights": st.just(False)})),
    st.tuples(st.just("LoKrConfig"), st.fixed_dictionaries({**low_rank, "init_weights": st.just(False)})),
)
name = st.sampled_from(NAMES)
unknown = st.sampled_from([*NAMES, "unknown"])
calls = st.one_of(
    st.tuples(st.just("add"), unknown, configs),
    st.tuples(st.just("set"), unknown),
    st.tuples(st.just("set several"), st.lists(name, min_size=1, max_size=2, unique=True)),
    st.tuples(st.just("merge"), st.booleans(), st.none() | st.lists(name, max_size=2, unique=True)),
    st.tuples(st.just("unmerge")),
    st.tuples(st.just("forward"), st.booleans()),
    st.tuples(st.just("rows"), st.lists(st.sampled_from(["__base__", *NAMES]), min_size=4, max_size=4)),
    st.tuples(st.just("disabled")),
    st.tuples(st.just("train")),
    st.tuples(st.just("weighted"), st.lists(name, min_size=1, max_size=2), st.sampled_from(["linear", "cat", "svd"])),
    st.tuples(st.just("scale"), st.sampled_from([0.5, 3.0])),
    st.tuples(st.just("requires_grad"), unknown, st.booleans()),
    st.tuples(st.just("state"), unknown),
    st.tuples(st.just("status")),
    st.tuples(st.just("load"), name),
)
programs = st.tuples(
    configs, st.sampled_from([torch.float32, torch.float64]), st.lists(calls, min_size=4, max_size=10)
)


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


class Program:
    """A model of one of the packages, and what can be called on it."""

    def __init__(self, package, folder, config, dtype, with_merged=False):
        self.package, self.folder, self.with_merged = package, folder, with_merged
        torch.manual_seed(0)
        base = Net().to(dtype)
        torch.manual_seed(1)
        self.model = package.get_peft_model(base, self.config(config)).eval()

    def config(self, config):
        return getattr(self.package, config[0])(**config[1])

    @property
    def merged(self):
        """Whether to skip what PEFT does otherwise while adapters are merged."""
        return not self.with_merged and any(layer.merged for layer in layers_of(self.model))

    def call(self, step, what, *args):
        torch.manual_seed(step)
        return getattr(self, what.replace(" ", "_"))(*args)

    def add(self, name, config):
        self.model.add_adapter(name, self.config(config))

    def set(self, name):
        self.model.set_adapter(name)

    def set_several(self, names):
        if set(names) <= set(self.model.peft_config):
            self.model.base_model.set_adapter(names)

    def merge(self, safe, names):
        self.model.merge_adapter(safe_merge=safe, adapter_names=names)

    def unmerge(self):
        self.model.unmerge_adapter()

    def forward(self, training):
        with torch.set_grad_enabled(training):
            return self.model(X).detach()

    def rows(self, names):
        lora = self.model.peft_config["default"].peft_type.value == "LORA"
        return self.model(X, adapter_names=names).detach() if lora else None

    def disabled(self):
        if self.merged:
            return None
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with self.model.disable_adapter():
            output = self.model(X).detach()
        for parameter, flag in flags:  # PEFT changes some
            parameter.requires_grad_(flag)
        return output

    def train(self):
        if self.merged:
            return None
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trained:
            return None
        optimizer = torch.optim.SGD(trained, lr=0.01)
        self.model.train()
        loss = self.model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.model.eval()
        return loss.detach()

    def weighted(self, names, combination):
        if not self.merged and set(names) <= set(self.model.peft_config) and "combined" not in self.model.peft_config:
            self.model.add_weighted_adapter(names, [0.5] * len(names), "combined", combination)

    def scale(self, factor):
        for layer in layers_of(self.model):
            if hasattr(layer, "scale_layer") and not layer.merged and isinstance(layer.get_base_layer(), nn.Linear):
                layer.scale_layer(factor)

    def delete(self, name):
        self.model.delete_adapter(name)

    def copied(self):
        self.model = copy.deepcopy(self.model)

    def requires_grad(self, name, flag):
        self.model.set_requires_grad(name, flag)

    def state(self, name):
        return dict(self.package.get_peft_model_state_dict(self.model, adapter_name=name))

    def status(self):
        status = self.package.get_model_status(self.model)
        return {key: value for key, value in vars(status).items() if key not in ("base_model_type",)}

    def load(self, name):
        if self.merged or name not in self.model.peft_config:
            return None
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        path = self.folder if name == "default" else self.folder / name
        if "loaded" not in self.model.peft_config:
            return str(self.model.load_adapter(path, "loaded", is_trainable=True))
        return self.package.load_peft_weights(path, device="cpu")

    def photo(self):
        flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        layers = [(layer.active_adapters, list(layer.merged_adapters)) for layer in layers_of(self.model)]
        return flags, layers, sorted(self.model.peft_config), self.model.active_adapters, self.model.state_dict()


class Raised(str):
    """The name of an exception's class."""


def attempt(act, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return act(*args)
        except Exception as error:
            return Raised(type(error).__name__)


def assert_same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
        scale = max(1.0, theirs.double().abs().max().item() if theirs.numel() else 0.0)
        assert torch.allclose(ours.double(), theirs.double(), atol=2e-4 * scale, rtol=0)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs)
        for left, right in zip(ours, theirs, strict=True):
            assert_same(left, right)
    else:
        assert ours == theirs


@settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to make a failing program smaller would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(program=programs)
def test_the_same_program_gives_the_same(program, tmp_path_factory):
    config, dtype, steps = program
    pair = []
    for package in (peft_c, peft):
        folder = tmp_path_factory.mktemp("saved")
        pair.append(attempt(Program, package, folder, config, dtype))
    if Raised in map(type, pair):
        assert pair[0] == pair[1]
        return
    for step, call in enumerate(steps):
        before = copy.deepcopy(pair[0].photo())
        ours, theirs = (attempt(side.call, step, *call) for side in pair)
        assert_same(ours, theirs)
        if isinstance(theirs, Raised):
            assert_same(pair[0].photo(), before)
            if call[0] in ("add", "load", "weighted", "set several"):  # PEFT may have done half of it
                return
        assert_same(*(side.photo() for side in pair))


more_calls = st.one_of(
    calls,
    st.tuples(st.just("delete"), unknown),
    st.tuples(st.just("copied")),
    st.tuples(st.just("merge"), st.booleans(), st.none()),
)


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(config=configs, dtype=st.sampled_from([torch.float32, torch.bfloat16]), steps=st.lists(more_calls, min_size=6))
def test_refused_calls_change_nothing_and_unmerging_brings_the_weights_back(config, dtype, steps, tmp_path_factory):
    side = attempt(Program, peft_c, tmp_path_factory.mktemp("saved"), config, dtype, True)
    if isinstance(side, Raised):
        return
    for step, call in enumerate(steps):
        before = copy.deepcopy(side.photo())
        if isinstance(attempt(side.call, step, *call), Raised) and call[0] != "train":
            flags, layers, adapters, active, state = side.photo()
            assert (flags, layers, adapters, active) == before[:4], call
            assert state.keys() == before[4].keys()
            assert all(torch.equal(state[key], before[4][key]) for key in state), call
    if any(layer.merged_adapters for layer in layers_of(side.model)):
        side.model.unmerge_adapter()
    torch.manual_seed(0)
    weights = {key: value.to(dtype) for key, value in Net().state_dict().items()}
    wrapped = (".base_layer", ".original_module", ".token_adapter", "base_model.model.")
    for key, value in side.model.state_dict().items():
        for part in wrapped:
            key = key.replace(part, "")
        assert key not in weights or torch.equal(value, weights[key]), key
