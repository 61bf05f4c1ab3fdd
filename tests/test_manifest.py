"""A checkpoint's manifest: what is whole, what is damaged, and how a full disk is recognised."""

from __future__ import annotations

import errno
import hashlib
import pickle
from pathlib import Path

import pytest
from fake_checkpoint import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import Model
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import (
    DamagedCheckpoint,
    FileRecord,
    fair_shares,
    hash_file,
    inspect_checkpoint,
    is_disk_full,
    latest_checkpoint,
    latest_step,
    verify_files,
    write_manifest,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoints" / "step_00000040", Model().model_dump())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_is_described(folder):
    info = inspect_checkpoint(folder)
    assert (info.step, info.vocab_size, info.model["num_layers"]) == (40, 512, 4)
    assert info.files["weights.distcp"] == hash_file(folder / "weights.distcp")
    verify_files(info, info.files)


def test_what_is_written_is_read_back(tmp_path):
    identity = {"stage": "rl", "iteration": 1, "step": 7, "model": {}, "vocab_size": 5, "tokenizer": "f"}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "a").write_bytes(b"abc")
    files = {"tokenizer/a": FileRecord(3, hashlib.sha256(b"abc").hexdigest())}
    write_manifest(tmp_path, identity, files)
    info = inspect_checkpoint(tmp_path)
    assert {name: getattr(info, name) for name in identity} == identity
    assert info.files == files
    verify_files(info, files)


def test_a_checksum_is_that_of_all_bytes_also_of_a_file_longer_than_a_block(tmp_path):
    content = bytes(range(256)) * 40_000  # 10 MB, in blocks of 4 MiB
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == FileRecord(len(content), hashlib.sha256(content).hexdigest())


def test_a_truncated_file_of_a_checkpoint_is_named_with_both_sizes(folder):
    (folder / "weights.distcp").write_bytes(b"w" * 10)
    with pytest.raises(DamagedCheckpoint, match="weights.distcp has 10 bytes instead of 1000"):
        inspect_checkpoint(folder)
    (folder / "weights.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="weights.distcp is missing"):
        inspect_checkpoint(folder)


def test_a_file_of_the_same_size_and_other_bytes_is_found_by_its_checksum_alone(folder):
    flip_a_bit(folder / "weights.distcp")
    info = inspect_checkpoint(folder)
    verify_files(info, [])
    with pytest.raises(DamagedCheckpoint, match=r"step_00000040 is damaged: weights.distcp has SHA-256 \w{12}\.\.\. "):
        verify_files(info, ["weights.distcp"])


def test_a_file_that_cannot_be_read_is_damage(folder):
    info = inspect_checkpoint(folder)
    (folder / "weights.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="weights.distcp cannot be read .*No such file"):
        verify_files(info, info.files)


def test_another_format_is_refused_and_not_taken_for_damage(tmp_path):
    write_checkpoint(tmp_path / "checkpoints" / "step_00000020", Model().model_dump())
    write_checkpoint(tmp_path / "checkpoints" / "step_00000040", Model().model_dump(), format=1)
    for look in (latest_checkpoint, latest_step):
        with pytest.raises(UserError, match="has format 1, this version reads format 2: make it again") as caught:
            look(tmp_path)
        assert not isinstance(caught.value, DamagedCheckpoint)


def test_what_is_no_checkpoint_is_refused_with_a_hint(tmp_path, folder):
    with pytest.raises(UserError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="give one of them, for example .*step_00000040"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 2, "files": {"a": 5}}', "\ufeff\x00"])
def test_an_unreadable_manifest_is_damage(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match="damaged: cannot read manifest.json"):
        inspect_checkpoint(folder)


def test_the_latest_checkpoint_is_the_newest_whole_one(tmp_path):
    steps = [
        write_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", Model().model_dump(), step=step)
        for step in (100, 200, 300)
    ]
    write_checkpoint(tmp_path / "checkpoints" / "step_00000400.tmp", Model().model_dump(), step=400)
    assert latest_checkpoint(tmp_path) == steps[2]
    assert latest_step(tmp_path) == 300
    (steps[2] / "weights.distcp").unlink()
    (steps[1] / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) == steps[0]
    assert latest_step(tmp_path) == 100


def test_a_stage_without_checkpoints_is_at_step_0(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_step(tmp_path / "nothing") == 0


@given(st.dictionaries(st.text(max_size=4), st.integers(0, 10**12)), st.integers(1, 9))
def test_shares_are_fair_and_have_every_file_once(sizes, parts):
    shares = fair_shares(sizes, parts)
    assert len(shares) == parts
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    assert shares == fair_shares(dict(reversed(sizes.items())), parts)


def chained(*errors: BaseException) -> BaseException:
    """Each raised from the next."""
    for error, cause in zip(errors, errors[1:], strict=False):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        chained(RuntimeError("unexpected pos 704 vs 598"), FULL),
        chained(RuntimeError("stage"), ValueError("save"), FULL),
        pickle.loads(pickle.dumps(chained(RuntimeError(f"Worker failure: {FULL}"), FULL))),
    ],
    ids=["itself", "quota", "cause", "cause_of_a_cause", "text_alone"],
)
def test_a_full_disk_is_recognised(error):
    assert is_disk_full(error)


def test_a_full_disk_is_recognised_behind_what_was_raised_while_it_was_handled():
    with pytest.raises(RuntimeError) as caught:
        try:
            raise FULL
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904
    assert is_disk_full(caught.value)


def test_other_errors_are_no_full_disk():
    error = RuntimeError("unexpected pos 704 vs 598")
    error.__context__ = error  # walked once
    assert not is_disk_full(error)
    assert not is_disk_full(chained(RuntimeError("Worker failure"), OSError(errno.EIO, "Input/output error")))
