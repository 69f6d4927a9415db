"""Files that are whole or absent, checkpoints that come back bit for bit, and a log without torn or double lines."""

import json
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_bwd import files
from sparse_bwd.files import write_json, write_safetensors
from sparse_bwd.training.checkpoint import load_checkpoint, save_checkpoint
from sparse_bwd.training.errors import UserError, is_no_space
from sparse_bwd.training.log import JsonLog, read_log

STATE: dict[str, Any] = {
    "numbers": [1, 2.5, -0.1 + 0.3, float("inf"), True, None, "word é"],
    "tuple": (1, (2, [3])),
    "by number": {0: torch.arange(3), (1, "a"): "b"},
    "empty": {"list": [], "dict": {}, "tensor": torch.zeros(0, 3)},
    "dtypes": [
        torch.ones(2, 2, dtype=dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool)
    ],
    "scalar": torch.tensor(3),
    "channels_last": torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
    "thin": torch.randn(4, 3, 1, 1).as_strided((4, 3, 1, 1), (3, 1, 3, 3)),
    "transposed": torch.randn(3, 4).t(),
    "strided": torch.randn(6, 6)[::2, ::3],
    "expanded": torch.randn(1, 3).expand(4, 3),
    "dollar": {"$tensor": "a word that the format uses itself"},
}


def assert_same(a: Any, b: Any) -> None:
    """Equal in type, value and, for dense tensors, strides."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype is b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path)
    assert_same(loaded, STATE)
    for name in ("channels_last", "thin", "transposed"):
        assert loaded[name].stride() == STATE[name].stride()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot hold a\.0 of type set"):
        save_checkpoint(tmp_path / "c", {"a": [{1, 2}]})
    assert list(tmp_path.iterdir()) == []


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(5), "c": torch.zeros(0)}
    write_safetensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    for name, tensor in load_file(tmp_path / "t.safetensors").items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "foreign", "version", "stride", "absent"])
def test_damaged_checkpoints_are_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.randn(8, 6).t(), "b": [1, 2]})
    good = path.read_bytes()
    if damage == "cut":
        path.write_bytes(good[:-10])
    elif damage == "garbage":
        path.write_bytes(os.urandom(300))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        write_safetensors(path, {}, {"format": "pt"})
    elif damage == "version":
        write_safetensors(path, {}, {"format": "sparse_bwd checkpoint", "version": "99", "state": "{}"})
    elif damage == "stride":
        path.write_bytes(good.replace(b'\\"stride\\": [1, 6]', b'\\"stride\\": [9, 6]'))
        assert path.read_bytes() != good
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and str(error.value).endswith(".")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "c.safetensors"
    path.write_bytes(pickle.dumps({"state": Bomb()}))
    with pytest.raises(UserError):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.zeros(1000)})
    before = path.read_bytes()
    write, left = files._write_all, [2]

    def full(file: IO[bytes], data: bytes) -> None:
        left[0] -= 1
        if left[0] < 1:
            raise OSError(28, "No space left on device", file.name)
        write(file, data)

    monkeypatch.setattr(files, "_write_all", full)
    with pytest.raises(OSError) as error:
        save_checkpoint(path, {"a": torch.ones(1000)})
    assert is_no_space(error.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    (tmp_path / ".r.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        write_json(tmp_path / "r.json", list(range(1000)))
    assert is_no_space(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def files_of_at_most_4000_bytes() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("files_of_at_most_4000_bytes")
def test_writes_that_stop_half_way_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        save_checkpoint(tmp_path / "c.safetensors", {"a": torch.ones(2000)})
    assert is_no_space(error.value)
    assert list(tmp_path.iterdir()) == []
    log = JsonLog(tmp_path / "log.jsonl")
    with pytest.raises(OSError):
        for number in range(1000):
            log.write("line", number=number, filler="x" * 100)
    log.close()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["number"] for line in lines] == list(range(len(lines))) and len(lines) > 10


def test_the_log_goes_on_from_a_length(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    log.write("a", x=1)
    kept = log.size
    log.write("b", x=2)
    log.sync()
    log.close()
    with path.open("ab") as file:
        file.write(b'{"event": "torn')
    again = JsonLog(path, kept)
    again.write("c", x=3)
    again.close()
    assert [(line["event"], line["x"]) for line in read_log(path)] == [("a", 1), ("c", 3)]


def test_a_log_that_was_edited_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"event": "a"}) + "\n" + '{"event"')
    log = JsonLog(path, 1000)
    log.write("b")
    log.close()
    assert [line["event"] for line in read_log(path)] == ["a", "b"]
    path.write_text("no log\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_log(path)
