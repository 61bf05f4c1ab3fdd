"""smollm3_3b: two turns of the flywheel with ReMiT (arXiv 2602.03075) on SmolLM3 3B, on 16 H100 80 GB.

From the paper: the model it measures ReMiT on, and ε 0.2. From SmolLM3's publication: the architecture, rows of 4,096
tokens in pre-training, the learning rate of 2e-4 before it decays linearly to 0, and that mathematics and code weigh
more in the decay. Ours: which public data sets stand for these, their shares, the length of the anneal, the SFT and RL
settings, the tasks, the layout. Its code is published as identifiers of files only: give a corpus of your own beside
these.

The checkpoint has to be one from before the decay, of HuggingFaceTB/SmolLM3-3B-checkpoints, through nemo-rmt import.
data/gsm8k.jsonl and data/sft.jsonl are made as for olmo2_1b (SmolLM3's own chats are HuggingFaceTB/smoltalk2).
"""

from __future__ import annotations

from nemo_rmt.recipes.olmo2_1b import olmo2_1b

from nemo_rmt.config import Corpus, Model, Recipe, Tokenizer

FOLDER = "checkpoints/smollm3_3b_stage2"
ROW, BATCH = 4096, 576
ANNEAL_TOKENS = 50e9


def smollm3_3b() -> Recipe:
    """ReMiT's flywheel on SmolLM3 3B, annealed on web pages, mathematics and textbooks; 16 H100."""
    recipe = olmo2_1b()
    recipe.name, recipe.run_dir = "smollm3_3b", "runs/smollm3_3b"
    recipe.model = Model(  # as published
        num_layers=36,
        hidden_size=2048,
        num_attention_heads=16,
        num_query_groups=4,
        ffn_hidden_size=11008,
        vocab_size=128_256,
        tie_embeddings=True,
        rope_base=50_000.0,  # what it is before its context is extended, after the decay
        rope_skip_interval=4,
        norm_epsilon=1e-6,
        max_position=ROW,
        precision="bf16",
    )
    recipe.tokenizer = Tokenizer(
        path=f"{FOLDER}/tokenizer",
        vocab_size=128_256,
        chat_template="{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    recipe.pretrain.checkpoint = FOLDER
    recipe.data.corpora = [
        _hub("web", "HuggingFaceFW/fineweb-edu", "sample-10BT", 0.6),
        _hub("math", "HuggingFaceTB/finemath", "finemath-4plus", 0.2),
        _hub("textbooks", "HuggingFaceTB/smollm-corpus", "cosmopedia-v2", 0.2),
    ]
    recipe.anneal.steps, recipe.anneal.global_batch_size = round(ANNEAL_TOKENS / (ROW * BATCH)), BATCH
    recipe.anneal.micro_batch_size = recipe.rl.micro_batch_size = recipe.sft.micro_batch_size = 1
    return recipe


def _hub(name: str, path: str, config: str, weight: float) -> Corpus:
    return Corpus(name=name, kind="hub", path=path, weight=weight, held_out=2000, options={"config": config})
