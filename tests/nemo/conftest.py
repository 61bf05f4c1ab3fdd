"""These tests need nemo_run, and those of the NeMo adapter NeMo's LLM collection: elsewhere they are not collected."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("nemo_run") is None:
    collect_ignore_glob.append("test_*.py")
elif importlib.util.find_spec("nemo.collections") is None:
    collect_ignore_glob.append("test_nemo2_*.py")
