"""Every initialisation scheme against PEFT's: the same numbers from the same seed, the same output, clear refusals."""

import pytest
import torch
from variant_cases import adapted, assert_same_state, build

import peft_c

PLAIN = [True, False, "gaussian"]
DENSE = ["olora", "pissa", "pissa_niter_4", "orthogonal", "mica"]
RESIDUAL = ("olora", "pissa", "pissa_niter_4")
CASES = [("linear", s) for s in PLAIN + DENSE]
CASES += [(kind, s) for kind in ("conv_1", "conv_2", "conv_3") for s in PLAIN + ["lora_ga"]]
CASES += [("embedding", s) for s in PLAIN + ["mica", "lora_ga", "pissa"]]
CASES += [("conv1d", s) for s in (True, "pissa", "orthogonal", "mica")]


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_same_as_peft(peft, kind, scheme):
    options = {"init_lora_weights": scheme, "fan_in_fan_out": kind == "conv1d"}
    mine, x = adapted(peft_c, kind, **options)
    theirs, _ = adapted(peft, kind, **options)
    assert_same_state(mine, theirs)
    torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert torch.rand(1).item() >= 0  # the generator is left alone by the comparison
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (mine, theirs)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize(("kind", "scheme"), [("linear", s) for s in RESIDUAL] + [("conv1d", s) for s in RESIDUAL])
def test_the_residual_keeps_the_output(kind, scheme):
    net, x, _ = build(kind)
    expected = net(x)
    model, x = adapted(peft_c, kind, init_lora_weights=scheme, fan_in_fan_out=kind == "conv1d")
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", DENSE)
def test_half_precision(peft, dtype, scheme):
    def run(package):
        net, _, targets = build("linear")
        torch.manual_seed(2)
        config = package.LoraConfig(target_modules=targets, r=4, init_lora_weights=scheme)
        return package.get_peft_model(net.to(dtype), config)

    assert_same_state(run(peft_c), run(peft), tolerance=1e-2)


@pytest.mark.parametrize(
    ("scheme", "r", "error", "text"),
    [
        ("pissa_niter_x", 4, ValueError, "pissa_niter"),
        ("pissa_nitre_4", 4, ValueError, "pissa"),
        ("nonsense", 4, ValueError, "Unknown initialization"),
        ("orthogonal", 3, ValueError, "even"),
        ("mica", 17, ValueError, "MiCA requires `r` <= min"),
        ("corda", 4, ValueError, "preprocess_corda"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refusals(scheme, r, error, text):
    net, _, targets = build("linear")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=text):
        peft_c.get_peft_model(net, peft_c.LoraConfig(target_modules=targets, r=r, init_lora_weights=scheme))
    for name, value in net.state_dict().items():
        if "lora" not in name:
            torch.testing.assert_close(value, before[name.replace("base_layer.", "")], rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["pissa", "olora", "mica"])
def test_integer_weights_are_refused(scheme):
    net, _, _ = build("linear")
    net.up.weight = torch.nn.Parameter(net.up.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="float16|data type"):
        peft_c.get_peft_model(net, peft_c.LoraConfig(target_modules=["up"], init_lora_weights=scheme))
