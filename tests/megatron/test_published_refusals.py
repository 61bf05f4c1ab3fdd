"""Folders that cannot be imported, and checkpoints that cannot be exported: one clear error, and nothing is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_models import ROWS, edited

from nemo_rmt import config
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.hugging_face import export_checkpoint, import_checkpoint

pytest.importorskip("transformers", reason="transformers is not installed")

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(published_folders, tmp_path) -> Path:
    """A copy of a folder that can be imported."""
    return shutil.copytree(published_folders["qwen3"], tmp_path / "source")


@pytest.fixture
def sharded(published_folders, tmp_path) -> Path:
    """The same model in several files."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(published_folders["qwen3"])
    model.save_pretrained(tmp_path / "source", max_shard_size="200KB")
    Tokenizer.load(published_folders["qwen3"]).save(tmp_path / "source")
    return tmp_path / "source"


def refused(source: Path, message: str, precision: str = "fp32") -> None:
    """The folder is refused in these words, and nothing is left beside it."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(UserError, match=message):
        import_checkpoint(source, source.parent / "checkpoint", precision)
    assert sorted(source.parent.iterdir()) == before


def change_index(folder: Path, changed) -> None:
    """Replace the index by what ``changed`` makes of its weight_map."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": changed(weight_map)}))


def test_folders_and_words_that_are_wrong(folder, tmp_path):
    refused(tmp_path / "nowhere", "config.json cannot be read .* give the folder of a Hugging Face model")
    refused(folder, "precision=fp16 is not one of fp32, bf16", "fp16")
    with pytest.raises(UserError, match="target=.* exists: give a new folder"):
        import_checkpoint(folder, tmp_path, "fp32")
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json cannot be read .it is no JSON object")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5, "layer_types": None}, "has no tensor model.layers.4.*its weights do not belong"),
        ({"num_hidden_layers": 3, "layer_types": None}, "has tensors that this architecture does not use: model.laye"),
        ({"intermediate_size": 80}, "have shape .* config.json makes them"),
        ({"vocab_size": ROWS + 1}, "embed_tokens.weight have shape .320, 64., config.json makes them .321, 64."),
        ({"vocab_size": 200}, "its tokenizer has 269 tokens and its model 200: the tokenizer does not belong"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r"has no tensor .*q_proj\.bias"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "brings code of its own"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures=GPT2LMHeadModel is not supported; these are: Llama"),
    ],
)
def test_weights_tokenizer_and_family_must_belong_together(folder, changes, message):
    refused(edited(folder, folder, **changes), message)


def test_a_tokenizer_that_is_missing_or_brings_code_is_refused(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["own.Own"]}}))
    refused(folder, "tokenizer_config.json has auto_map: the tokenizer brings code of its own")
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer.json: download the model again")


def test_a_truncated_file_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(folder, "model.safetensors is damaged .*: download it again")
    weights.write_bytes(b"")
    refused(folder, "model.safetensors is damaged .*: download it again")


def test_a_missing_file_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors: download the model again, with its safetensors files")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_read(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(folder, f"{name}: pickled weights can run code and are never read; convert them to safetensors")


def test_quantised_weights_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights[EMBEDDING] = weights[EMBEDDING].to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"{EMBEDDING} is of type I8: quantised weights cannot be read")


def test_a_missing_shard_is_refused(sharded):
    import_checkpoint(sharded, sharded.parent / "whole", "fp32")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    refused(sharded, f"has no {shards[1].name}: download the model again")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda places: None, "is damaged: it has no weight_map"),
        (lambda places: {**places, EMBEDDING: 7}, "is damaged: it has no weight_map"),
        (lambda places: {name: place for name, place in places.items() if name != EMBEDDING}, f"no tensor {EMBEDDING}"),
        (lambda places: {**places, "model.layers.9.x": places[EMBEDDING]}, "has no tensor model.layers.9.x; download"),
        (lambda places: {**places, EMBEDDING: f"../source/{places[EMBEDDING]}"}, "is not in the folder itself"),
        (lambda places: {**places, EMBEDDING: "/etc/passwd"}, "names the file /etc/passwd, which is not in the folder"),
    ],
)
def test_a_damaged_index_is_refused(sharded, changed, message):
    change_index(sharded, changed)
    refused(sharded, message)


def test_an_index_that_is_no_json_is_refused(sharded):
    (sharded / INDEX).write_text((sharded / INDEX).read_text()[:50])
    refused(sharded, f"{INDEX} cannot be read .*: download the model again")


@pytest.fixture(scope="module")
def checkpoint(published_folders, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_checkpoint(published_folders["qwen3"], target, "fp32")
    return target


def test_a_damaged_checkpoint_is_not_exported(checkpoint, tmp_path):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    shard = next(damaged.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"is damaged: {shard.name} has SHA-256"):
        export_checkpoint(damaged, tmp_path / "exported", checkpoint / "tokenizer")
    shard.unlink()
    with pytest.raises(UserError, match=f"is truncated: {shard.name} is missing"):
        export_checkpoint(damaged, tmp_path / "exported", checkpoint / "tokenizer")
    assert list(tmp_path.iterdir()) == [damaged]


def test_a_model_that_no_family_has_is_not_exported(checkpoint, tmp_path):
    strange = shutil.copytree(checkpoint, tmp_path / "strange")
    manifest = json.loads((strange / "manifest.json").read_text())
    manifest["model"]["qkv_bias"] = True
    (strange / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no published architecture has model.qk_norm=True, model.qkv_bias=True"):
        export_checkpoint(strange, tmp_path / "exported", checkpoint / "tokenizer")
    assert list(tmp_path.iterdir()) == [strange]


def test_another_tokenizer_or_an_existing_target_is_refused(checkpoint, tmp_path):
    train_tokenizer(["quite other words"] * 9, config.Tokenizer(vocab_size=290), tmp_path / "other")
    with pytest.raises(UserError, match="is not the tokenizer that .* was trained with .fingerprint"):
        export_checkpoint(checkpoint, tmp_path / "exported", tmp_path / "other")
    with pytest.raises(UserError, match="target=.*other exists: give a new folder"):
        export_checkpoint(checkpoint, tmp_path / "other", checkpoint / "tokenizer")
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 4}, "tensor=4 does not divide the model's num_query_groups=2"),
        ({"pipeline": 3}, "pipeline=3 does not divide the model's num_layers=4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(checkpoint, published_folders, tmp_path, layout, message):
    parallel = config.Parallel(**layout)
    with pytest.raises(UserError, match=message):
        export_checkpoint(checkpoint, tmp_path / "exported", checkpoint / "tokenizer", parallel=parallel)
    with pytest.raises(UserError, match=message):
        import_checkpoint(published_folders["qwen3"], tmp_path / "imported", "fp32", parallel)
    assert not list(tmp_path.iterdir())
