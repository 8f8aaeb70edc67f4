"""LoraConfig and its nested configs against PEFT's: fields, defaults, metadata, files both ways, refusals."""

import dataclasses
import json
import typing

import pytest

import peft_c
from peft_c.tuners.lora import config as mine

NAMES = [
    "LoraConfig",
    "LoraRuntimeConfig",
    "VeloraConfig",
    "LoftQConfig",
    "ArrowConfig",
    "BdLoraConfig",
    "EvaConfig",
    "KasaConfig",
    "CordaConfig",
    "LoraGAConfig",
    "MontecloraConfig",
]

FULL = {
    "r": 5,
    "target_modules": ["q_proj"],
    "rank_pattern": {"x": 3},
    "use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 2},
    "velora_config": {"num_groups": 3},
    "kasa_config": {"beta": 0.5},
    "lora_ga_config": {"direction": "random"},
    "monteclora_config": {"num_samples": 2},
    "arrow_config": {"top_k": 2, "task_adapter_names": None, "gks_adapter_names": None},
    "layer_replication": [[0, 2]],
}


@pytest.mark.parametrize("name", NAMES)
def test_fields(peft, name):
    from peft.tuners.lora import config as theirs

    def describe(cls):
        return [
            (
                f.name,
                f.init,
                f.default,
                getattr(f.default_factory, "__name__", None),
                f.metadata.get("is_lora_variant"),
            )
            + (f.metadata.get("lora_variants"),)
            for f in dataclasses.fields(cls)
        ]

    assert describe(getattr(mine, name)) == describe(getattr(theirs, name))
    assert all(f.metadata.get("help") for f in dataclasses.fields(getattr(mine, name)))


@pytest.mark.parametrize("options", [{}, FULL, {"target_modules": "all-linear", "init_lora_weights": "pissa_niter_4"}])
def test_files_are_interchangeable(peft, tmp_path, options):
    from peft.tuners.lora import config as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        ours, reference = mine.LoraConfig(**options), theirs.LoraConfig(**options)
        ours.save_pretrained(tmp_path / "ours")
        reference.save_pretrained(tmp_path / "reference")
        written = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "reference")]
        for content in written:
            content.pop("peft_version")
        assert written[0] == written[1]
        assert list(written[0]) == list(written[1])
        read = peft_c.PeftConfig.from_pretrained(tmp_path / "reference")
        back = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(read, mine.LoraConfig) and isinstance(back, theirs.LoraConfig)
    for loaded, original in ((read, ours), (back, reference)):
        loaded.peft_version = original.peft_version
        assert loaded.to_dict() == original.to_dict()
    for name in ("use_bdlora", "velora_config", "kasa_config", "lora_ga_config", "monteclora_config", "arrow_config"):
        assert type(getattr(read, name)).__name__ == type(getattr(ours, name)).__name__


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_parameters": "x"}, TypeError, "list of strings"),
        ({"target_modules": "a.*", "layers_to_transform": 1}, ValueError, "layers_to_transform"),
        ({"target_modules": "a.*", "layers_pattern": "h"}, ValueError, "layers_pattern"),
        ({"layers_pattern": "h"}, ValueError, "must also be specified"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, ValueError, "megatron"),
        ({"init_lora_weights": "loftq"}, ValueError, "loftq_config"),
        ({"lora_bias": True, "use_dora": True}, ValueError, "DoRA"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, ValueError, "init_lora_weights=pissa"),
        ({"kasa_config": 3}, TypeError, "KasaConfig"),
        ({"task_type": "NONE"}, ValueError, "task type"),
    ],
)
def test_refusals(options, error, text):
    with pytest.raises(error, match=text):
        mine.LoraConfig(**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mine.VeloraConfig(num_groups=0),
        lambda: mine.VeloraConfig(scale=-1),
        lambda: mine.VeloraConfig(init_type="zero"),
        lambda: mine.ArrowConfig(top_k=0),
        lambda: mine.ArrowConfig(router_temperature=0),
        lambda: mine.BdLoraConfig(target_modules_bd_a=["x"], target_modules_bd_b=["x"]),
        lambda: mine.EvaConfig(rho=0.5),
        lambda: mine.EvaConfig(tau=2),
        lambda: mine.KasaConfig(gamma=-1),
        lambda: mine.MontecloraConfig(num_samples=0),
        lambda: mine.MontecloraConfig(buffer_size=-1),
    ],
)
def test_nested_refusals(make):
    with pytest.raises(ValueError, match="got|overlap|Unsupported"):
        make()


def test_options_of_idle_schemes_warn():
    with pytest.warns(UserWarning, match="eva_config.*ignored"):
        mine.LoraConfig(eva_config=mine.EvaConfig())
    with pytest.warns(UserWarning, match="corda_config.*not specified"):
        assert mine.LoraConfig(init_lora_weights="corda").corda_config == mine.CordaConfig()
    with pytest.warns(UserWarning, match="loftq_config.*ignored"):
        assert mine.LoraConfig(loftq_config=mine.LoftQConfig()).loftq_config == {}
    with pytest.warns(UserWarning, match="path_initial_model_for_weight_conversion"):
        mine.LoraConfig(init_lora_weights="olora", use_rslora=True, rank_pattern={"a": 2})


def test_annotations_resolve():
    assert typing.get_type_hints(mine.LoraConfig)["r"] is int


def test_custom_modules_add_up():
    config = mine.LoraConfig()
    config._register_custom_module({int: str})
    config._register_custom_module({float: bytes})
    assert config._custom_modules == {int: str, float: bytes}
    assert "runtime_config" not in config.to_dict()
