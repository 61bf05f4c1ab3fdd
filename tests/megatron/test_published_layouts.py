"""Hugging Face to Megatron and back in every layout: bitwise the same tensors, and transformers' numbers on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_models import FAMILIES, published
from published_worker import PROMPTS, rows
from safetensors import safe_open
from safetensors.torch import load_file
from torchrun import run_ranks

from nemo_rmt.config import Parallel
from nemo_rmt.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORKER = Path(__file__).with_name("published_layout_worker.py")
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
}
BF16 = "qwen2"
"""The family that also is in bfloat16."""


@pytest.fixture(scope="module")
def folders(published_folders, tokenizer_folder, tmp_path_factory) -> dict[str, Path]:
    """The published folders, one of them in bfloat16 too, to be written beside."""
    there = tmp_path_factory.mktemp("layouts")
    copies = {family: shutil.copytree(folder, there / family) for family, folder in published_folders.items()}
    copies["bf16"] = there / "bf16"
    published(BF16).bfloat16().save_pretrained(copies["bf16"])
    Tokenizer.load(tokenizer_folder).save(copies["bf16"])
    return copies


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, folders) -> str:
    """A layout that every folder went through."""
    parallel = Parallel(**LAYOUTS[request.param])
    run_ranks(
        WORKER,
        parallel.tensor * parallel.pipeline,
        request.param,
        parallel.model_dump_json(),
        *map(str, folders.values()),
    )
    return request.param


def exported(folders: dict[str, Path], family: str, layout: str) -> Path:
    return folders[family].with_name(f"{family}.{layout}")


families = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("family", [*FAMILIES, "bf16"])
def test_every_tensor_comes_back_bit_by_bit(folders, layout, family):
    before, after = load_file(folders[family] / "model.safetensors"), {}
    files = sorted(exported(folders, family, layout).glob("*.safetensors"))
    assert (len(files) == 1) == (layout == "tp1")
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert file.stat().st_size < 110_000 or layout == "tp1"
        after |= load_file(file)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@families
@torch.no_grad()
def test_logits_and_logprobs_in_between_are_those_of_transformers(folders, layout, family):
    batch, found = rows(), json.loads((folders[family].parent / f"{family}.{layout}.json").read_text())
    logits = published(family)(batch.tokens).logits
    expected = logits.log_softmax(-1).gather(2, batch.labels[..., None])[..., 0]
    torch.testing.assert_close(torch.tensor(found["logprobs"]), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found["logits"]), logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "bf16"])
@torch.no_grad()
def test_transformers_loads_what_was_written_and_says_the_same(folders, layout, family):
    folder = exported(folders, family, layout)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    original = published(BF16).bfloat16() if family == "bf16" else published(family)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model) is type(original) and model.dtype == original.dtype
    for prompt in PROMPTS:
        said = [
            each.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False).tolist()
            for each in (model, original)
        ]
        assert said[0] == said[1]


@families
def test_the_tokenizer_is_the_same_to_transformers(folders, layout, family):
    folder = exported(folders, family, layout)
    ours, theirs = Tokenizer.load(folders[family]), transformers.AutoTokenizer.from_pretrained(folder)
    text = "12+7=19; A few  words.\n"
    assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eod, ours.pad)
    messages = [{"role": "user", "content": "1+2"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(rendered, add_special_tokens=False) == ours.chat_prompt(messages)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": ours.eod, "pad_token_id": ours.pad}


def test_the_index_says_where_each_tensor_is(folders, layout):
    folder = exported(folders, "llama", layout)
    if layout == "tp1":
        assert not (folder / "model.safetensors.index.json").exists()
        return
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = load_file(folders["llama"] / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    number = len(set(index["weight_map"].values()))
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{place:05d}-of-{number:05d}.safetensors" for place in range(1, number + 1)
    ]
    for name, place in index["weight_map"].items():
        with safe_open(folder / place, "pt") as opened:
            assert name in opened.keys()
