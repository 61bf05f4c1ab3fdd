"""``nemo-rmt import`` and ``nemo-rmt export``: any layout, what they refuse, and what is left when they fail."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from fake_checkpoint import write_checkpoint
from safetensors.torch import load_file
from small_recipe import small_recipe
from torchrun import run_ranks

from nemo_rmt import cli, conversion
from nemo_rmt.config import Model
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import FAILED
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.stages.job import StageJob

pytest.importorskip("transformers", reason="transformers is not installed")

HERE = Path(__file__).parent


def nemo_rmt(command: str, **words: object) -> int:
    return cli.main([command, *(f"{key}={value}" for key, value in words.items())])


@pytest.fixture(scope="module")
def checkpoint(published_folders, tmp_path_factory) -> Path:
    """Imported by two tensor-parallel ranks."""
    target = tmp_path_factory.mktemp("commands") / "checkpoint"
    assert nemo_rmt("import", source=published_folders["olmo2"], target=target, precision="fp32", tensor=2) == 0
    return target


def test_there_and_back_through_two_layouts_is_bitwise_the_same(published_folders, checkpoint, tmp_path, capsys):
    inspect_checkpoint(checkpoint)
    assert nemo_rmt("export", source=checkpoint, target=tmp_path / "back", pipeline=2) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'back'}: ")
    before, after = (load_file(f / "model.safetensors") for f in (published_folders["olmo2"], tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(tmp_path.iterdir()) == [tmp_path / "back"]


def test_exported_in_another_precision_it_is_rounded(published_folders, checkpoint, tmp_path):
    assert nemo_rmt("export", source=checkpoint, target=tmp_path / "back", precision="bf16") == 0
    before, after = (load_file(f / "model.safetensors") for f in (published_folders["olmo2"], tmp_path / "back"))
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_one_of_two_ranks_refuses_is_one_line_and_exit_code_2(published_folders, tmp_path, capfd):
    source = shutil.copytree(published_folders["olmo2"], tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"short")
    assert nemo_rmt("import", source=source, target=tmp_path / "checkpoint", tensor=2) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"nemo-rmt: error: {source / 'model.safetensors'} is damaged")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": "nowhere"}, "export takes source=CHECKPOINT, target=HF_FOLDER and, if need be, "),
        ({"source": "nowhere", "target": "there"}, "source=nowhere does not exist"),
        ({"source": "here", "target": "there", "colour": "blue"}, "export takes source=CHECKPOINT"),
        ({"source": ".", "target": "there"}, "is not a complete checkpoint"),
        ({"source": "here", "target": "there"}, "give the folder of the tokenizer it was trained with, tokenizer="),
        ({"source": "here", "target": "there", "tokenizer": "here", "tensor": "two"}, "tensor=two is not a whole num"),
    ],
)
def test_wrong_words_are_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "here", Model().model_dump(mode="json"))
    assert nemo_rmt("export", **words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_tokenizer_of_a_runs_checkpoint_is_that_of_its_data(tokenizer_folder, tmp_path):
    stage = tmp_path / "run/iteration_001/rl"
    checkpoint = stage / "checkpoints/step_00000005"
    checkpoint.mkdir(parents=True)
    shutil.copytree(tokenizer_folder, tmp_path / "run/iteration_000/data/tokenizer")
    recipe = small_recipe(str(tmp_path / "somewhere else"))
    StageJob(stage="rl", iteration=1, inputs={"data": "iteration_000/data"}, recipe=recipe).save(stage / "stage.yaml")
    assert conversion.tokenizer_of(checkpoint) == tmp_path / "run/iteration_000/data/tokenizer"
    shutil.rmtree(tmp_path / "run/iteration_000")
    with pytest.raises(UserError, match="neither .*tokenizer nor the data stage of its run is there: .*tokenizer="):
        conversion.tokenizer_of(checkpoint)


def test_a_rank_that_is_killed_ends_the_others_and_is_named(tmp_path):
    code = "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(99)"
    started = time.monotonic()
    outcome = conversion._run(["-c", code], 2, str(tmp_path))
    assert time.monotonic() - started < 30
    assert (outcome.status, outcome.rank) == (FAILED, 1)
    assert outcome.reason == "rank 1 was killed by SIGKILL, perhaps for want of memory"


def test_an_export_that_cannot_write_fails_on_every_rank_and_leaves_nothing(published_folders, tmp_path):
    (tmp_path / "out").mkdir()
    worker = HERE / "failing_export_worker.py"
    run_ranks(worker, 4, str(published_folders["qwen3"]), str(tmp_path / "out/exported"))
    assert not list((tmp_path / "out").iterdir())
