"""``python -m nemo_rmt`` is ``nemo-rmt``."""

from __future__ import annotations

import sys

from nemo_rmt.cli import main

if __name__ == "__main__":
    sys.exit(main())
