"""``nemo`` as a person types it, in this process: importing nemo_run takes seconds."""

from __future__ import annotations

import io
import sys
from unittest import mock

import pytest
from nemo_run.cli.api import create_cli


def nemo(*words: str, answer: str = "") -> int:
    """Run ``nemo WORDS...`` with ``answer`` as its input, and return its exit code."""
    with mock.patch.object(sys, "argv", ["nemo", *words]), mock.patch.object(sys, "stdin", io.StringIO(answer)):
        with pytest.raises(SystemExit) as ended:
            create_cli()(list(words))
    return ended.value.code
