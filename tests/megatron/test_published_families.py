"""config.json of every family as our model section, and back; what is refused."""

from __future__ import annotations

import json

import pytest
from published_models import FAMILIES, ROWS, edited

from nemo_rmt.compatibility import architecture
from nemo_rmt.config import Model
from nemo_rmt.errors import UserError
from nemo_rmt.families import config_json, model_from_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WITHOUT_MEANING = {"_name_or_path", "bos_token_id", "transformers_version"}
"""Keys of a configuration in which ours may be another."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_comes_back_as_it_was(published_folders, tmp_path, family):
    settings = model_from_config(published_folders[family])
    ours = config_json(settings, ROWS, eos=0, pad=0)
    (tmp_path / "config.json").write_text(json.dumps(ours))
    again = model_from_config(tmp_path)
    assert architecture(again.model_dump()) == architecture(settings.model_dump())
    assert (again.vocab_size, again.max_position, again.init_std) == (ROWS, settings.max_position, settings.init_std)
    # To transformers too it is the configuration of the same model.
    theirs = transformers.AutoConfig.from_pretrained(published_folders[family]).to_dict()
    read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert ours["architectures"] == json.loads((published_folders[family] / "config.json").read_text())["architectures"]
    assert {key: read[key] for key in theirs.keys() - WITHOUT_MEANING if read.get(key) != theirs[key]} == {}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "model.qk_norm=True, model.qkv_bias=True together"),
        ({"norm_position": "after"}, "model.norm_position=after together"),
        ({"qk_norm": True, "qk_norm_span": "all_heads"}, "model.qk_norm=True, model.qk_norm_span=all_heads"),
        ({"qk_norm": True, "rope_skip_interval": 2}, "model.qk_norm=True, model.rope_skip_interval=2"),
    ],
)
def test_a_model_that_no_family_has_is_refused_by_its_keys(keys, named):
    with pytest.raises(UserError, match=f"no published architecture has {named}.*there are LlamaForCausalLM"):
        config_json(Model(**keys), 300, eos=0)


def test_a_published_configuration_becomes_our_keys(published_folders):
    keys = model_from_config(published_folders["olmo2"]).model_dump()
    expected = {"norm_position": "after", "qk_norm": True, "qk_norm_span": "all_heads", "tie_embeddings": False}
    expected |= {"num_layers": 4, "num_query_groups": 2, "norm_epsilon": 1e-3, "rope_base": 500.0, "vocab_size": ROWS}
    assert {key: keys[key] for key in expected} == expected
    keys = model_from_config(published_folders["smollm3"]).model_dump()
    assert (keys["rope_skip_interval"], keys["rope_base"], keys["tie_embeddings"]) == (2, 2e6, True)
    keys = model_from_config(published_folders["qwen3"]).model_dump()
    assert (keys["head_dim"], keys["qk_norm"], keys["qk_norm_span"], keys["qkv_bias"]) == (24, True, "head", False)


def test_keys_as_earlier_transformers_wrote_them_mean_the_same(published_folders, tmp_path):
    old = edited(published_folders["smollm3"], tmp_path, rope_parameters=None, rope_theta=7e5, no_rope_layers=None)
    settings = model_from_config(old)
    assert (settings.rope_base, settings.rope_skip_interval) == (7e5, 2)
    listed = edited(published_folders["smollm3"], tmp_path, no_rope_layers=[1, 1, 1, 1], tie_word_embeddings=None)
    assert model_from_config(listed).rope_skip_interval is None and model_from_config(listed).tie_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures=Qwen3MoeForCausalLM is not supported; these are"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope scaling is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope scaling is not supported"),
        ({"attention_bias": True}, "attention_bias=true .* is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding attention in layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"no_rope_layers": [1, 0, 0, 1]}, "no_rope_layers=.* zeros must come at one regular interval"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
            "brings code of its own .trust_remote_code., which is",
        ),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_attention_heads": 3}, "describes a model that is not supported"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(published_folders, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        model_from_config(edited(published_folders["smollm3"], tmp_path, **changes))
