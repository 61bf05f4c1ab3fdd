"""These tests need megatron-bridge, which .ci/install_bridge installs."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("megatron.bridge") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import bridge_on_cpu  # noqa: F401  before anything else imports megatron.bridge


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Hugging Face models: ``rl``, and ``deeper`` with one layer more."""
    from tiny_bridge import hugging_face_model

    folder = tmp_path_factory.mktemp("models")
    hugging_face_model(seed=0).save_pretrained(folder / "rl")
    hugging_face_model(seed=0, layers=3).save_pretrained(folder / "deeper")
    return folder
