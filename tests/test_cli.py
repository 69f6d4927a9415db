"""The command line: what it prints, and one sentence with exit code 2 for everything that the user can put right."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

import sparse_bwd.files as files
from sparse_bwd.cli import app
from sparse_bwd.training.log import JsonLog
from tests.pictures import bomb, garbage, make_folder, truncated
from tests.training_net import tiny

TINY = "tests.training_net:tiny"
SMALL = [
    "--image-size",
    "16",
    "--limit-train",
    "74",
    "--limit-test",
    "20",
    "--epochs",
    "1",
    "--budget",
    "20%",
    "--quiet",
    "--no-measure",
]


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `sparse-bwd WORDS`."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def finetune(out: Path, *words: object) -> tuple[int, str, str]:
    return run("finetune", "--model", TINY, "--data", "digits", "--out", out, *SMALL, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on three brightnesses, with its images beside it."""
    root = tmp_path_factory.mktemp("finished")
    make_folder(root / "images", 40, ("dark", "grey", "light"))
    words = ["--data", root / "images", "--out", root / "run", "--image-size", 16, "--epochs", 4, "--lr", 0.2]
    code, _, stderr = run("finetune", "--model", TINY, *words, "--policy", "full", "--batch-norm", "train")
    assert code == 0, stderr
    return root


def test_finetune_evaluate_predict(finished: Path) -> None:
    run_folder, images = finished / "run", finished / "images"
    result = json.loads((run_folder / "result.json").read_text())
    words = ("--run", run_folder, "--model", TINY)
    code, stdout, _ = run("evaluate", *words, "--data", images, "--json")
    assert code == 0 and json.loads(stdout)["accuracy"] == result["accuracy"] > 0.8
    assert json.loads(stdout)["images"] == 24
    code, stdout, _ = run("evaluate", *words, "--data", images)
    assert code == 0 and "of 24 images" in stdout
    pictures = [images / "dark" / "0.jpg", images / "light" / "0.jpg"]
    code, stdout, _ = run("predict", *words, *pictures, "--json", "--top", 2)
    rows = json.loads(stdout)
    assert [row["predictions"][0]["class"] for row in rows] == ["dark", "light"]
    assert all(len(row["predictions"]) == 2 for row in rows)
    code, stdout, _ = run("predict", *words, pictures[0])
    assert code == 0 and stdout.startswith(f"{pictures[0]}: dark ")


def test_progress_and_summary_are_printed(tmp_path: Path) -> None:
    words = [word for word in SMALL if word != "--quiet"]
    code, stdout, stderr = run(
        "finetune", "--model", TINY, "--data", "digits", "--out", tmp_path / "run", *words
    )
    assert code == 0
    assert "test accuracy" in stdout and "of 1,512 weights (budget 302)" in stdout
    assert "64 training and 20 test images" in stderr and "epoch 1/1: train loss" in stderr


def test_json_is_the_result(tmp_path: Path) -> None:
    code, stdout, _ = finetune(tmp_path / "run", "--json", "--mean", "0.4", "--std", "0.1,0.2,0.3")
    result = json.loads(stdout)
    assert code == 0 and result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["config"]["preprocessing"]["std"] == [0.1, 0.2, 0.3]
    code, stdout, _ = run("finetune", "--resume", "--out", tmp_path / "run", "--model", TINY, "--json")
    assert code == 0 and json.loads(stdout) == result


BAD_OPTIONS = {
    "model": (["--model", "mobilenet_v22"], "mobilenet_v2"),
    "data": (["--data", "cifar01"], "cifar10"),
    "folder": (["--data", "no/such/folder"], "does not exist"),
    "policy": (["--policy", "velocty"], "velocity"),
    "recipe": (["--recipe", "papre"], "paper"),
    "axis": (["--axis", "sideways"], "out"),
    "batch norm": (["--batch-norm", "frozn"], "frozen"),
    "scheme": (["--policy", "sparse-update", "--scheme", "mbv2-9"], "nearest are mbv2-"),
    "scheme of another network": (["--policy", "sparse-update"], "52 convolutions"),
    "first": (["--first", "randon"], "There is no scheme 'randon'"),
    "velocity": (["--velocity", "skech"], "sketch"),
    "probe": (["--probe", "pictures"], "noise"),
    "labels of noise": (["--policy", "trady", "--probe", "noise"], "needs images with labels"),
    "threshold": (["--policy", "neq", "--threshold", "-1"], "threshold is -1.0"),
    "budget": (["--budget", "lots"], "number of weights"),
    "weights": (["--weights", "absent.safetensors"], "does not exist"),
    "device": (["--device", "toaster"], "--device cpu"),
    "limit": (["--limit-train", "0"], "at least 1"),
    "rate": (["--lr", "-1"], "above 0"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_one_sentence_and_leave_nothing(tmp_path: Path, case: str) -> None:
    words, expected = BAD_OPTIONS[case]
    out = tmp_path / "run"
    code, stdout, stderr = finetune(out, *words)
    assert_refused(code, stdout, stderr, expected)
    assert not out.exists()


def assert_refused(code: int, stdout: str, stderr: str, expected: str) -> None:
    """One sentence on stderr, exit code 2, nothing on stdout."""
    assert code == 2 and stdout == ""
    assert stderr.startswith("Error: ") and stderr.count("\n") == 1 and expected in stderr


@pytest.mark.parametrize("spoil", [garbage, truncated, lambda path: bomb(path, 12_000, 11_000)])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_bad_image_leaves_nothing(tmp_path: Path, spoil: Callable[[Path], Path], part: str) -> None:
    for name in ("train", "test"):
        make_folder(tmp_path / "images" / name)
    path = spoil(tmp_path / "images" / part / "bee" / "3.jpg")
    code, stdout, stderr = finetune(tmp_path / "run", "--data", tmp_path / "images")
    assert_refused(code, stdout, stderr, str(path))
    assert not (tmp_path / "run").exists()


def test_wrong_weights_leave_nothing(tmp_path: Path) -> None:
    state = tiny(10).state_dict()
    save_file({key: state[key] for key in list(state)[1:]}, tmp_path / "w.safetensors")
    code, stdout, stderr = finetune(tmp_path / "run", "--weights", tmp_path / "w.safetensors")
    assert_refused(code, stdout, stderr, "they lack 0.0.weight")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    code, stdout, stderr = finetune(tmp_path)
    assert_refused(code, stdout, stderr, "--resume to go on")
    code, stdout, stderr = finetune(tmp_path / "precious")
    assert_refused(code, stdout, stderr, "is not an empty folder")
    code, stdout, stderr = finetune(tmp_path / "precious" / "run")
    assert_refused(code, stdout, stderr, "precious")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def _fill_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From the write number `after` on, the disk is full."""
    write, left = files._write_all, [after]

    def full(file: IO[bytes], data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        write(file, data)

    monkeypatch.setattr(files, "_write_all", full)


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_is_full_at_the_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out = tmp_path / "run"
    if there:
        out.mkdir()
    _fill_disk(monkeypatch, 3)
    code, stdout, stderr = finetune(out)
    assert_refused(code, stdout, stderr, "There is no room left to write")
    assert out.exists() is there and (not there or not list(out.iterdir()))


def test_a_disk_that_fills_later_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        log = JsonLog.write

        def full(self: JsonLog, event: str, **fields: Any) -> None:
            if event == "epoch":
                raise OSError(errno.ENOSPC, "No space left on device")
            log(self, event, **fields)

        patch.setattr(JsonLog, "write", full)
        code, stdout, stderr = finetune(out)
    assert_refused(code, stdout, stderr, "no room left to write to --out")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]
    code, _, stderr = run("finetune", "--resume", "--out", out, "--model", TINY, "--quiet", "--no-measure")
    assert code == 0, stderr
    assert (out / "result.json").exists()


def test_a_file_that_may_not_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "there/log.jsonl")

    monkeypatch.setattr(files, "_write_all", refuse)
    code, stdout, stderr = finetune(tmp_path / "run")
    assert_refused(code, stdout, stderr, "there/log.jsonl cannot be used: Permission denied.")


def test_ctrl_c_before_training_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_bwd.training.run.prepare", interrupt)
    code, _, stderr = finetune(tmp_path / "run")
    assert code == 130 and "Interrupted" in stderr
    assert not (tmp_path / "run").exists()


def test_a_new_run_needs_a_model_and_data(tmp_path: Path) -> None:
    for words in (["--resume"], ["--model", TINY], ["--data", "digits"]):
        code, stdout, stderr = run("finetune", "--out", tmp_path / "run", *words)
        assert_refused(code, stdout, stderr, "A new run needs --model and --data")


def test_resume_refuses_other_options_and_other_data(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 20)
    out = tmp_path / "run"
    assert finetune(out, "--data", tmp_path / "images")[0] == 0
    (out / "result.json").unlink()
    resume = ("finetune", "--resume", "--out", out, "--quiet", "--no-measure")
    assert_refused(*run(*resume), f"give --model {TINY}")
    assert_refused(*run(*resume, "--model", TINY, "--lr", 0.7), "another --lr")
    (tmp_path / "images" / "bee" / "3.jpg").rename(tmp_path / "images" / "bee" / "x3.jpg")
    assert_refused(*run(*resume, "--model", TINY), "is not what the run in")
    (tmp_path / "images" / "bee" / "x3.jpg").rename(tmp_path / "images" / "bee" / "3.jpg")
    assert run(*resume, "--model", TINY)[0] == 0


def test_a_resume_on_another_machine_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    assert finetune(out)[0] == 0
    (out / "result.json").unlink()
    monkeypatch.setattr("sparse_bwd.training.run.machine", lambda *_: {"torch": "0.1", "threads": 1})
    code, _, stderr = run("finetune", "--resume", "--out", out, "--model", TINY, "--quiet", "--no-measure")
    assert code == 0 and "this one has 0.1: the result will not be the same bit for bit" in stderr


def test_evaluate_and_predict_explain_what_is_wrong(finished: Path, tmp_path: Path) -> None:
    words = ("--run", finished / "run", "--model", TINY)
    make_folder(tmp_path / "two", 5)
    assert_refused(
        *run("evaluate", *words, "--data", tmp_path / "two"), "The run knows 3 classes (dark, grey, light)"
    )
    assert_refused(*run("evaluate", "--run", finished / "run", "--data", "digits"), f"give --model {TINY}")
    assert_refused(*run("evaluate", "--run", tmp_path, "--data", "digits"), "classes.json is missing")
    assert_refused(*run("predict", *words, garbage(tmp_path / "x.jpg")), "is corrupt or not one of")
    assert_refused(*run("predict", *words, tmp_path / "absent.jpg"), "does not exist")


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("classes.json", "[", "cannot be read"),
        ("classes.json", '["dark", "light"]', "disagree about the number of classes"),
        ("preprocessing.json", "{}", "cannot be read: KeyError"),
        ("model.safetensors", "x", "not a readable safetensors file"),
    ],
)
def test_damaged_runs_are_one_sentence(
    finished: Path, tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    for path in (finished / "run").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(text)
    words = ("--run", tmp_path, "--model", TINY, finished / "images" / "dark" / "0.jpg")
    assert_refused(*run("predict", *words), sentence)


def test_three_numbers_or_one() -> None:
    for text in ("a", "1,2", "1,2,3,4"):
        code, _, stderr = run("finetune", "--model", TINY, "--data", "digits", "--out", "x", "--mean", text)
        assert code == 2 and "is not one number or three" in stderr


def test_help_comes_without_heavy_imports() -> None:
    check = (
        "import sys; sys.argv = ['sparse-bwd', '--help']\ntry:\n    from sparse_bwd.cli import main; main()\n"
    )
    check += "finally:\n    assert 'torchvision' not in sys.modules and 'timm' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(name in found.stdout for name in ("finetune", "evaluate", "predict"))
