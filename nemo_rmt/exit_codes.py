"""What the processes' exit statuses mean."""

DONE = 0
FAILED = 1
"""A stage failed."""
WRONG_INPUT = 2
"""Refused before anything was trained."""
DIVERGED = 65
"""Of a rank: too many steps in a row were skipped, or the sampler's probabilities were not the trainer's. Another start
would end the same way."""
DISK_FULL = 74
"""Of a rank: a file system is full. Another start would find it full again."""
STOPPED = 75
"""Stopped on request, what was done is saved: start it again to continue. (EX_TEMPFAIL of sysexits.h.)"""
