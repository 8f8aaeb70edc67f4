"""Random programs of API calls leave the same state as with the installed peft: which adapters are active and merged
on each layer, what is trainable, and the type of every error."""

import random
import warnings

import pytest
import torch
from torch import nn

import peft_c
import peft_c.functional

peft = pytest.importorskip("peft")
pytest.importorskip("peft.functional")

TARGETS = (["lin0", "lin1"], ["lin0"], ["lin1", "conv"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin1": nn.Linear(6, 6, bias=False)})
        self.conv = nn.Conv1d(2, 2, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.block["lin1"](torch.relu(self.lin0(x))))


class Twin:
    """One model under both packages; `do` runs a call on both and compares what they did."""

    def __init__(self, same_targets: bool, save_head: bool):
        self.save_head, self.same_targets = save_head, same_targets
        self.pairs = []
        for package in (peft, peft_c):
            torch.manual_seed(0)
            self.pairs.append((package, package.get_peft_model(Net(), self.config(package, 0, False))))
        self.log = ["get_peft_model"]

    def config(self, package, i, inference_mode):
        return package.LoraConfig(
            r=2,
            target_modules=TARGETS[0] if self.same_targets else TARGETS[i % 3],
            modules_to_save=["head"] if self.save_head and i % 2 == 0 else None,
            inference_mode=inference_mode,
        )

    def do(self, name, call, keep_flags=False):
        self.log.append(name)
        errors = []
        for package, model in self.pairs:
            error = None
            # peft unfreezes frozen adapters here; peft_c brings back what was
            flags = {n: p.requires_grad for n, p in model.named_parameters()} if keep_flags else {}
            torch.manual_seed(1)
            try:
                call(package, model)
            except Exception as exc:
                error = type(exc)
            errors.append(error)
            if package is peft:
                for n, p in model.named_parameters():
                    # fully trained modules restore the flags of the active adapter only
                    if n in flags and (p.requires_grad or ".modules_to_save." not in n):
                        p.requires_grad = flags[n]
        assert errors[0] == errors[1], self.log
        self.compare()
        return errors[0]

    def compare(self):
        (_, theirs), (_, ours) = self.pairs
        state = [self.state(model) for model in (theirs, ours)]
        for key, value in state[0].items():
            assert state[1][key] == value, (key, self.log[-4:])

    @staticmethod
    def state(model):
        layers = {
            name: (list(m.active_adapters), list(m.merged_adapters), m.disable_adapters)
            for name, m in model.named_modules()
            if hasattr(m, "active_adapters") and hasattr(m, "merged_adapters")
        }
        return {
            "layers": layers,
            "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
            "order": [n for n, _ in model.named_parameters()],
            "configs": list(model.peft_config),
            "tuner": model.base_model.active_adapters,
            "targeted": model.base_model.targeted_module_names,
        }


def with_disabled(model, then=lambda: None):
    model.base_model.disable_adapter_layers()
    then()
    model.base_model.enable_adapter_layers()


def random_step(rng: random.Random, twin: Twin):
    names = list(twin.pairs[0][1].peft_config)
    name = rng.choice(names)
    some = rng.sample(names, rng.randint(1, len(names)))
    flag = rng.random() < 0.5
    kind = rng.choice(
        "add add_frozen set set_list set_unknown functional grad grad_list disable set_while_disabled "
        "merge unmerge delete delete_unknown layer_set add_twice".split()
    )
    base = lambda m: m.base_model  # noqa: E731
    if kind in ("add", "add_frozen") and len(names) < 5:
        new, i = f"a{rng.randrange(1000)}", rng.randrange(6)
        twin.do(f"{kind} {new} {i}", lambda p, m: m.add_adapter(new, twin.config(p, i, kind == "add_frozen")))
    elif kind == "add_twice":
        twin.do(f"add {name} again", lambda p, m: m.add_adapter(name, twin.config(p, 0, False)))
    elif kind == "set":
        twin.do(f"set {name} {flag}", lambda p, m: m.set_adapter(name, inference_mode=flag))
    elif kind == "set_list":
        twin.do(f"set {some} {flag}", lambda p, m: base(m).set_adapter(some, inference_mode=flag))
    elif kind == "set_unknown":
        twin.do("set nope", lambda p, m: m.set_adapter("nope"))
    elif kind == "functional":
        twin.do(f"functional {name}", lambda p, m: p.functional.set_adapter(base(m).model, name))
        twin.do(f"set {name}", lambda p, m: m.set_adapter(name))
    elif kind == "grad":
        twin.do(f"grad {name} {flag}", lambda p, m: m.set_requires_grad(name, flag))
    elif kind == "grad_list":
        twin.do(f"grad {some} {flag}", lambda p, m: base(m).set_requires_grad(some, requires_grad=flag))
    elif kind == "disable":
        twin.do("disable, enable", lambda p, m: with_disabled(m), keep_flags=True)
    elif kind == "set_while_disabled":
        twin.do(f"set {name} while disabled", lambda p, m: with_disabled(m, lambda: m.set_adapter(name)))
    elif kind == "merge":
        twin.do(f"merge {some}", lambda p, m: m.merge_adapter(adapter_names=some))
    elif kind == "unmerge":
        twin.do("unmerge", lambda p, m: m.unmerge_adapter())
    elif kind == "delete" and len(names) > 1 and twin.same_targets:
        twin.do(f"delete {name}", lambda p, m: base(m).delete_adapter(name))
        left = list(twin.pairs[0][1].peft_config)
        twin.do(f"set {left[0]}", lambda p, m: m.set_adapter(left[0]))
    elif kind == "delete_unknown":
        twin.do("delete nope", lambda p, m: base(m).delete_adapter("nope"))
    elif kind == "layer_set":
        i = rng.randrange(2)

        def set_on_layer(p, m):
            layers = [x for x in m.modules() if isinstance(x, p.tuners.tuners_utils.BaseTunerLayer)]
            layers[i % len(layers)].set_adapter(some, inference_mode=flag)

        twin.do(f"layer {i} set {some} {flag}", set_on_layer)


@pytest.mark.parametrize("save_head", [False, True])
@pytest.mark.parametrize("same_targets", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed, same_targets, save_head):
    rng = random.Random(f"{seed} {same_targets} {save_head}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = Twin(same_targets, save_head)
        for _ in range(25):
            random_step(rng, twin)


def unfreeze(package, model):
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(True)


@pytest.mark.parametrize("freeze", [True, False])
def test_weights_trained_by_hand_are_switched_too(freeze):
    # a user unfreezes the active adapter by hand, then activates another one
    twin = Twin(True, False)
    twin.do("add b", lambda p, m: m.add_adapter("b", twin.config(p, 0, False)))
    twin.do("freeze", lambda p, m: m.set_adapter("default", inference_mode=freeze))
    twin.do("unfreeze by hand", unfreeze)
    twin.do("set b", lambda p, m: m.set_adapter("b"))
