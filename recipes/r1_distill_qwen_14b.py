"""r1_distill_qwen_14b: RMT (arXiv 2509.24375) on DeepSeek-R1-Distill-Qwen-14B, the paper's other base model.

Data, schedule and layout are those of qwen3_14b, where it is said which are the paper's.
"""

from __future__ import annotations

from nemo_rmt.recipes.qwen3_14b import qwen3_14b

from nemo_rmt.config import Model, Recipe, Tokenizer


def r1_distill_qwen_14b() -> Recipe:
    """RMT on DeepSeek-R1-Distill-Qwen-14B with Omni-MATH's problems and solutions; 16 H100."""
    recipe = qwen3_14b()
    recipe.name, recipe.run_dir = "r1_distill_qwen_14b", "runs/r1_distill_qwen_14b"
    recipe.model = Model(  # as published: Qwen2.5-14B's
        num_layers=48,
        hidden_size=5120,
        num_attention_heads=40,
        num_query_groups=8,
        ffn_hidden_size=13824,
        vocab_size=152_064,
        qkv_bias=True,
        tie_embeddings=False,
        rope_base=1e6,
        norm_epsilon=1e-5,
        max_position=131_072,
        precision="bf16",
    )
    folder = "checkpoints/r1_distill_qwen_14b"
    recipe.tokenizer = Tokenizer(path=f"{folder}/tokenizer", vocab_size=151_665, chat_template=None)
    recipe.pretrain.checkpoint = folder
    return recipe
