"""What the pages show works: code runs, command lines parse, links lead somewhere, the notebook is whole.

The pages are README.md, CONTRIBUTING.md and those in docs/. Blocks of Python run in the order of the page and in one
namespace, as a reader would paste them; `GIVEN` has what a page takes as given. A block of a kind that nothing here
runs or parses is a failure, and so is a command that nothing here knows.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparse_bwd as sb
from tests.small import Small, labelled, small_net

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
TOUR = ROOT / "docs" / "tour.ipynb"
BLOCK = re.compile(r"^ *```(?P<kind>[^\n]*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
Space = dict[str, Any]


def blocks(page: str, kind: str) -> list[str]:
    return [match["text"] for match in BLOCK.finditer(PAGES[page]) if match["kind"] == kind]


# ---- Python


@contextmanager
def two_kinds_of_ranks(folder: Path) -> Iterator[Space]:
    """A network for DistributedDataParallel and one with blocks for FSDP2, in a group of one process."""
    import timm

    images, labels = torch.randn(8, 3, 10, 10), torch.arange(8) % 4
    vit = timm.create_model("vit_tiny_patch16_224", img_size=10, patch_size=5, depth=1, num_classes=4)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        space: Space = {
            "sb": sb,
            "torch": torch,
            "net": Small(),
            "vit": vit,
            "images": images,
            "labels": labels,
        }
        yield space
    finally:
        dist.destroy_process_group()
    assert space["policy"].steps == 2 and space["policy"].model is vit


@contextmanager
def a_ranking(folder: Path) -> Iterator[Space]:
    space: Space = {"model": small_net()}
    yield space
    policy = space["policy"]
    assert isinstance(policy, sb.selection.RankedPolicy) and list(policy.step()) == ["7"]


@contextmanager
def two_networks(folder: Path) -> Iterator[Space]:
    """A base and another one; the file that the page saves stands for two."""
    pytest.importorskip("onnxscript")
    file = "birds.safetensors"
    space: Space = {
        "model": Small(),
        "fresh": Small(),
        "images": labelled()[0],
        "first": file,
        "second": file,
    }
    yield space
    assert (folder / "birds.onnx").exists()
    assert torch.equal(space["program"].module()(space["images"]), space["model"](space["images"]))


@contextmanager
def three_trainers(folder: Path) -> Iterator[Space]:
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("transformers")
    from tests import test_hugging_face as hugging_face
    from tests.test_lightning import Module, data, loader

    module, bert, net = Module(), hugging_face.bert(), Small()
    sb.restore(module.net)
    sb.restore(bert)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 1}
    quiet |= {"default_root_dir": folder, "enable_model_summary": False, "accelerator": "cpu"}
    arguments = hugging_face.trainer_of(bert, folder / "out", 1, save_strategy="epoch").args
    space: Space = {
        "sb": sb, "torch": torch, "module": module, "images": data()[0], "loader": loader(), "quiet": quiet,
        "bert": bert, "arguments": arguments, "words": hugging_face.Words(), "net": net,
    }  # fmt: skip
    yield space
    assert space["policy"].steps == 3 and all(bool(p.isfinite().all()) for p in net.parameters())


# What a page takes as given, with what must hold when it has run.
GIVEN: dict[str, Callable[[Path], AbstractContextManager[Space]]] = {
    "docs/distributed.md": two_kinds_of_ranks,
    "docs/policies.md": a_ranking,
    "docs/sharing.md": two_networks,
    "docs/trainers.md": three_trainers,
}
# Pages that go on where another one ended, which they include.
AFTER = {"docs/quickstart.md": "README.md"}
LONG = {"docs/compile.md"}  # compiles a step, which takes minutes on a busy machine


def readable() -> list[Any]:
    found = [page for page in PAGES if page not in AFTER and blocks(page, "python")]
    return [pytest.param(page, marks=[pytest.mark.long] if page in LONG else [], id=page) for page in found]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", readable())
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = GIVEN.get(page, lambda folder: nullcontext({}))
    with given(tmp_path) as space:
        for name in [page, *(later for later, first in AFTER.items() if first == page)]:
            for number, block in enumerate(blocks(name, "python"), 1):
                exec(compile(block, f"{name}, block {number}", "exec"), space)


# ---- Commands


class Parsed(Exception):
    """The options of a command were understood."""


def parse_ours(words: list[str]) -> None:
    """Let the command line read its options, and go no further."""
    from typer.main import get_command

    from sparse_bwd.cli import app

    known: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in known, f"sparse-bwd has no command {words[0]}"
    try:
        known[words[0]].make_context(words[0], words[1:])
    except Exception as error:  # typer's, which stand elsewhere in every version
        raise AssertionError(f"sparse-bwd {' '.join(words)}: {error!r}") from error


def parse_module(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start `python -m NAME`, and stop it when argparse has read its options."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(Parsed):
            runpy.run_module(name, run_name="__main__")


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse one command line with its own parser; AssertionError if it is none that is known here."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    match words:
        case ["sparse-bwd", *rest] | ["python", "-m", "sparse_bwd", *rest]:
            parse_ours(rest)
        case ["python", "-m", name, *rest] if name.startswith("benchmarks."):
            parse_module(name, rest, monkeypatch)
        case ["pip", "install", package]:
            table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
            extras = re.findall(r"^([\w-]+) = \[", table.split("\n[")[0], re.MULTILINE)
            asked = re.fullmatch(r"(?:\.|sparse-bwd)(?:\[([\w,-]+)\])?", package)
            assert asked, f"{line}: not a package of this project"
            assert set((asked[1] or "dev").split(",")) <= set(extras), f"{line}: no such extra"
        case ["make", *targets]:
            verbs = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(verbs), f"{line}: no such target"
        case _:
            raise AssertionError(f"nothing in tests/test_pages.py can check the command: {line}")


def commands(page: str) -> list[str]:
    """Lines of bash, and lines of text behind a prompt, with continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    shown = [line[2:] for text in blocks(page, "text") for line in text.splitlines() if line.startswith("$ ")]
    return [line for line in [*lines, *shown] if line.strip()]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands(page):
        check_command(line, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "line", ["sparse-bwd finetune --polcy velocity", "sparse-bwd tarin", "python -m benchmarks.step --rouds 3",
             "make dcos", "pip install '.[trianing]'", "pip install elsewhere", "curl somewhere"],
)  # fmt: skip
def test_wrong_commands_are_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line, monkeypatch)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    """Python, commands, what is printed, and directives, which building the site carries out."""
    found = {(page, match["kind"]) for page, text in PAGES.items() for match in BLOCK.finditer(text)}
    known = re.compile(r"python|bash|text|\{[\w-]+\}.*")
    assert not [place for place in sorted(found) if not known.fullmatch(place[1])]
    for page, text in PAGES.items():
        assert 2 * len(BLOCK.findall(text)) == text.count("```"), (
            f"{page}: a block does not end, or is nested"
        )
        for block in blocks(page, "text"):
            assert not re.search(r"^(import|from) \w|^(sparse-bwd|python|torchrun) ", block, re.MULTILINE), (
                page
            )


# ---- Links, names, the notebook


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", PAGES[page]) + re.findall(r'src="([^"]+)"', PAGES[page])
    here = (ROOT / page).parent
    missing = [t for t in targets if not t.startswith("http") and not (here / t).exists()]
    assert not missing, missing


def test_the_api_page_has_every_public_name() -> None:
    from sparse_bwd import distributed, selection, training

    page = PAGES["docs/api.md"]
    documented = set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)", page, re.MULTILINE))
    for module in (sb, selection, sb.memory, distributed, training):
        missing = set(module.__all__) - documented - {"memory", "__version__"}
        assert not missing, missing


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(TOUR.read_text())["cells"]
    return found


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output.get("text", [])) for output in cell.get("outputs", []))


def test_the_notebook_is_whole() -> None:
    found = cells()
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert len(found) == 10 and len(code) >= 6
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in code)
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not re.search(r"(?<![\w.~/])/(?:home|root|Users|work|tmp|opt|mnt|usr)/\w", TOUR.read_text())


@pytest.mark.long
def test_the_notebook_runs_again() -> None:
    """With the same bytes; accuracies depend on the processor."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(
        book,
        timeout=300,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": ROOT}},
    ).execute()
    counts = re.compile(r"predicted ([\d,]+) bytes, measured ([\d,]+), dense ([\d,]+)")
    then, now = (
        [match for cell in of for match in counts.findall(printed(cell))] for of in (cells(), book.cells)
    )
    assert now == then and len(now) == 1 and now[0][0] == now[0][1]
