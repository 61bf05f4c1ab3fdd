"""lm-eval asks with the token ids that our own evaluation asks with, whatever the tokenizer and the question."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from small_recipe import small_recipe

from nemo_rmt import config
from nemo_rmt.data.seeds import problem_is_held_out
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer
from nemo_rmt.stages.lm_eval.tasks import write_tasks

pytest.importorskip("lm_eval")

QUESTIONS = [
    "what is NUMBER+2",
    "  spaces, NUMBER and a line end \n",
    "{{ question }} NUMBER {% raw %}",
    "a box \\boxed{NUMBER}, é, 数",
    "more\n\nthan NUMBER line",
]
CHATS = {
    "the default": (None, False),
    "begins a sequence by its template": ("{{ bos_token }}[{{ messages[0].content }}]\n", True),
    "begins none, though its tokenizer would": ("[{{ messages[0].content }}]\n", True),
}


@pytest.fixture(scope="module", params=CHATS)
def model(request, tmp_path_factory) -> Path:
    """A Hugging Face folder of an untrained model, with a tokenizer of one of the kinds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    template, begins = CHATS[request.param]
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(QUESTIONS * 20, config.Tokenizer(vocab_size=300), folder)
    if begins:
        add_beginning(folder)
    Tokenizer.load(folder, template or config.Tokenizer().chat_template).save(folder)
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)).save_pretrained(folder)
    return folder


def add_beginning(folder: Path) -> None:
    """Make the tokenizer put <|pad|> before all that it is not told to leave as it is, as Llama's does its bos."""
    content, settings = (
        json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    (pad,) = (token["id"] for token in content["added_tokens"] if token["content"] == "<|pad|>")
    special = {"<|pad|>": {"id": "<|pad|>", "ids": [pad], "tokens": ["<|pad|>"]}}
    parts = [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": parts,
        "special_tokens": special,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|pad|>"}))


def held_out(question: str) -> str:
    """The question with the first number that makes it one of those held out."""
    variants = (question.replace("NUMBER", str(number)) for number in itertools.count())
    return next(variant for variant in variants if problem_is_held_out(variant))


def test_prompts_are_our_own(model, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    asked = [held_out(question) for question in QUESTIONS]
    trained = [f"{number}" for number in range(20)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": text, "answer": 3}) + "\n" for text in [*asked, *trained]))
    tasks = [{"name": "odd", "family": "questions", "options": {"path": str(file)}}]
    recipe = small_recipe("unused", data={"tasks": tasks}, evaluate={"problems": 99, "lm_eval": {"enabled": True}})
    questions = write_tasks(recipe, 1, tmp_path / "tasks")
    assert set(asked) <= set(questions)

    task = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False).load("odd_greedy")["tasks"][
        "odd_greedy"
    ]
    theirs = HFLM(str(model), device="cpu", dtype="float32", add_bos_token=False, max_length=128)
    task.build_all_requests(
        apply_chat_template=True, fewshot_as_multiturn=True, chat_template=theirs.apply_chat_template
    )
    prompts = {instance.doc["question"]: instance.args[0] for instance in task.instances}
    ours = Tokenizer.load(model)
    for question in questions:
        tokens, _ = theirs.tok_batch_encode([prompts[question]])
        assert tokens[0].tolist() == ours.chat_prompt([{"role": "user", "content": question}])
