"""From files and generators to token batches: tokenizer, corpora, tasks with verifiers, SFT examples.

Nothing here knows about Megatron or processes, and only ``batch``, ``tree`` and ``difficulty`` import torch: the
command line's pre-flight reads corpora and tasks without it.

- ``tokenizer``: a tokenizer folder, or a byte-level BPE trained on the corpora; conversations to tokens.
- ``corpora``: documents of each corpus kind, split into training and held-out ones that never overlap; they come from
  ``text_files``, from ``tables`` and the Hugging Face hub by way of ``records``, or from ``chains`` and the tasks.
- ``tasks``: problems with verifiers, for RL and evaluation: ``chains``, ``questions_task`` (``final_answer`` says what
  counts as the same answer) and ``reasoning_gym_task`` (``worked``: solutions of some of its datasets, step by step).
- ``sft``: conversations for supervised fine-tuning, from a file or generated.
- ``difficulty``, ``positions``: which tokens of documents are hard, and which of them RMT asks for.
- ``thoughts``: the prompt that asks for a token after a thought, and what a response holds.
- ``fingerprint``, ``logprob_cache``: what identifies a tokenized dataset, and a model's log-probability of every token
  of it, 2 bytes each, in ``cache_blocks``; the likeliest tokens beside it where they are asked for.
- ``batch``: ``TokenBatch``, what every training objective and evaluation is given.
- ``tree``: documents with the responses that branch off them, packed so that a document is computed once.
"""
