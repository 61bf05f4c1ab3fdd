"""A tensor-parallel trainer that sends its weights to a running server, twice; rank 0 alone has the backend.

usage: trainer_worker.py URL MODEL_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import served_model
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rmt.config import Parallel
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.published import published_stream
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.vllm.server import ServerBackend


def main(url: str, folder: Path) -> None:
    with distributed(Parallel(tensor=2), seed=3) as layout:
        chunks = build_model(served_model.MODEL, Parallel(tensor=2), served_model.VOCAB)
        backend = None
        if layout.rank == 0:
            settings = served_model.rollout(url=url)
            backend = ServerBackend(
                settings, served_model.MODEL, model_folder=folder, vocab_size=served_model.VOCAB, log=folder / "log"
            )
        answers = []
        for version in (41, 42):
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data.mul_(1.5)
            if backend is None:
                for _ in published_stream(chunks, served_model.MODEL):
                    pass
            else:
                backend.load(published_stream(chunks, served_model.MODEL), version)
                answers.append(backend.complete(served_model.requests(8)))
            mine = {name: tensor.clone() for name, tensor in published_stream(chunks, served_model.MODEL)}
            if backend is not None:
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
                model.load_state_dict(mine, strict=not served_model.MODEL.tie_embeddings)
                error = served_model.largest_error(model, served_model.requests(8), answers[-1])
                assert error < 1e-4, f"version {version}: {error}"
                assert {answer.version for answer in answers[-1]} == {version}
        if backend is not None:
            assert answers[0] != answers[1]
            backend.close()
            print("served both", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
