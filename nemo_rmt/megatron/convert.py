"""One rank of a conversion: ``python -m nemo_rmt.megatron.convert import|export FOLDER KEYS`` (KEYS as JSON).

FOLDER: for signs of life; why a rank ended is left there. Exit status: see ``nemo_rmt.exit_codes``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path

from nemo_rmt import pulse
from nemo_rmt.config import Parallel
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DISK_FULL, DONE, FAILED, WRONG_INPUT
from nemo_rmt.manifest import is_disk_full
from nemo_rmt.megatron.hugging_face import export_checkpoint, import_checkpoint

BEAT_S = 5.0
"""Seconds between signs of life, which nobody waits for here."""


def main(command: str, folder: str, keys: str) -> int:
    """Convert, with the other ranks; returns the exit status."""
    logging.disable(logging.INFO)
    life = pulse.start(Path(folder), int(os.environ.get("RANK", "0")), BEAT_S)
    given = json.loads(keys)
    parallel = Parallel(tensor=given.pop("tensor"), pipeline=given.pop("pipeline"))
    paths = {key: Path(given.pop(key)) for key in ("source", "target", "tokenizer") if key in given}
    try:
        {"import": import_checkpoint, "export": export_checkpoint}[command](**paths, **given, parallel=parallel)
        return DONE
    except UserError as error:
        life.fail(str(error))
        return WRONG_INPUT
    except Exception as error:
        life.fail(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return DISK_FULL if is_disk_full(error) else FAILED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
