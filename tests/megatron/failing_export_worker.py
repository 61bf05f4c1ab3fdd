"""Export while rank 0 may write only small files; every rank must raise OSError.

usage: failing_export_worker.py FOLDER TARGET
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from nemo_rmt.config import Parallel
from nemo_rmt.families import model_from_config
from nemo_rmt.megatron.hugging_face import export_folder, load_published, published_files
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed

if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    settings, parallel = model_from_config(source), Parallel(tensor=2, pipeline=2)
    with distributed(parallel, seed=1) as place:
        chunks = build_model(settings, parallel, settings.vocab_size, initialize=False)
        load_published(published_files(source, settings), settings, chunks)
        if place.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        try:
            export_folder(chunks, settings, target, source, settings.vocab_size)
        except OSError as error:
            assert "File too large" in str(error), error
        else:
            raise AssertionError("the export did not notice")
