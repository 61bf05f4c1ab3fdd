"""A recipe small enough for tests: every stage in seconds, on the real model and data."""

from __future__ import annotations

from nemo_rmt.config import Recipe

OPTIM = {"lr": 2e-3, "warmup_steps": 1}


def small_recipe(run_dir: str, **changes: dict) -> Recipe:
    """A 0.1 M parameter model on arithmetic chains; ``changes`` replace top-level sections' keys."""
    stage = {"steps": 5, "micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 64, "optim": OPTIM}
    values = {
        "name": "small_test",
        "run_dir": run_dir,
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 96,
            "qk_norm": True,
            "qkv_bias": True,
            "max_position": 128,
        },
        "tokenizer": {"vocab_size": 300},
        "data": {
            "corpora": [{"name": "chains", "kind": "chains", "num_documents": 1500, "held_out": 0.1}],
            "tasks": [{"name": "chains", "longer": {"lengths": [6, 7]}}],
        },
        "pretrain": stage,
        "anneal": {**stage, "optim": {**OPTIM, "schedule": "linear", "warmup_steps": 0}},
        "rmt": {
            **stage,
            "sequence_length": 128,
            "document_length": 64,
            "long_documents": "split",
            "prompt": {"instruction": "[{budget}]"},
            "budget": {"initial": 8, "decay": 0.5},
            "difficulty": {"edges": None, "quantiles": (0.5, 0.8), "first_position": 4, "max_tokens": 4000},
            "curriculum": {"positions_per_document": 2},
            "grpo": {"samples_per_group": 4},
        },
        "sft": stage,
        "rl": {**stage, "global_batch_size": 32, "micro_batch_size": 4, "grpo": {"samples_per_group": 4}},
        "rollout": {"max_new_tokens": 12, "batch_size": 64},
        "evaluate": {"problems": 8, "samples": 2, "max_tokens": 1024, "sequence_length": 64, "micro_batch_size": 4},
        "tracking": {"tensorboard": False},
    }
    for section, keys in changes.items():
        values[section] = {**values[section], **keys} if isinstance(keys, dict) and section in values else keys
    return Recipe.model_validate(values)
