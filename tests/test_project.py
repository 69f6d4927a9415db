"""Files that no other test reads keep their promises: README, settings, house rules."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import sparse_bwd as sb
from benchmarks.readme import PAGES, filled

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PRAGMA = re.compile(r"#\s*pragma:\s*no cover\s*(?P<rest>.*)$")
# Written in pieces, so that this file does not contain what it forbids.
FOREIGN = [
    r"(?<![\w.~/])/(?:home|root|Users|work|tmp|opt|mnt)/\w",
    "files\\." + "pythonhosted",
    "py" + r"pi\.org",
    "registry\\." + "npmjs",
]


def tracked_files() -> list[Path]:
    """Files of the project: tracked ones, and new ones that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def grep_hooks() -> list[dict[str, str]]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return [hook for repo in config["repos"] for hook in repo["hooks"] if hook["language"] == "pygrep"]


@pytest.mark.parametrize("hook", grep_hooks(), ids=lambda hook: hook["id"])
def test_house_rules(hook):
    banned, files = re.compile(hook["entry"]), re.compile(hook["files"])
    exclude = re.compile(hook.get("exclude", "^$"))
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in tracked_files()
        if files.search(relative(path)) and not exclude.search(relative(path))
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if banned.search(line)
    ]
    assert not found, f"{hook['name']}:\n" + "\n".join(found)


def test_no_machine_paths_or_hosts():
    banned = re.compile("|".join(FOREIGN))
    found = [
        f"{relative(path)}: {match.group()}"
        for path in tracked_files()
        for match in banned.finditer(text_of(path))
    ]
    assert not found, found


def test_no_large_files():
    large = [relative(path) for path in tracked_files() if path.stat().st_size > 500_000]
    assert not large, large
    figures = ROOT / "docs" / "figures"
    heavy = [relative(path) for path in figures.glob("*.png") if path.stat().st_size > 200_000]
    assert not heavy, heavy


def test_ruff_version_is_written_twice_but_equal():
    pins = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    pins += re.findall(r"^ruff==([\d.]+)", (ROOT / "requirements" / "test.txt").read_text(), re.MULTILINE)
    assert len(pins) == 3
    assert len(set(pins)) == 1


def test_version_is_consistent():
    assert importlib.metadata.version("sparse-bwd") == sb.__version__
    others = [
        relative(path)
        for path in tracked_files()
        if path.suffix in (".py", ".cff", ".toml", ".cfg")
        and relative(path) != "sparse_bwd/version.py"
        and re.search(rf"version\W+[\"']?{re.escape(sb.__version__)}\b", text_of(path))
    ]
    assert not others, f"the version belongs into sparse_bwd/version.py only, not into {others}"


def test_examples_are_short():
    long = {path.name: text_of(path).count("\n") for path in (ROOT / "examples").glob("*.py")}
    assert {
        "custom_loop.py",
        "lightning.py",
        "hugging_face.py",
        "ddp.py",
        "own_policy.py",
        "own_model.py",
    } <= set(long)
    assert max(long.values()) <= 60, long


def test_the_workflow_of_wheels_serves_every_platform_and_names_files_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    jobs = workflow["jobs"]
    machines = {entry["machine"] for entry in jobs["native"]["strategy"]["matrix"]["include"]}
    machines |= set(jobs["pure-test"]["strategy"]["matrix"]["machine"])
    kinds = {re.sub(r"-[\d.]+", "", machine) for machine in machines}
    assert kinds == {"ubuntu", "ubuntu-arm", "macos", "windows"}
    assert set(jobs["release"]["needs"]) == {"native", "pure-test"} and jobs["pure-test"]["needs"] == "pure"
    assert "sha256sum" in yaml.dump(jobs["release"])
    settings = text_of(ROOT / "pyproject.toml").partition("[tool.cibuildwheel]")[2]
    named = re.findall(r"(?:\.\./|\{project\}/)(\S+\.py)", settings + yaml.dump(jobs))
    assert len(named) == 2 and all((ROOT / name).is_file() for name in named), named


def test_setup_py_is_small():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 90


def test_uncovered_lines_are_listed():
    """Each line excluded from coverage gives its reason and stands in tests/not_covered.txt, and nothing else does."""
    marked = []
    for path in sorted((ROOT / "sparse_bwd").rglob("*.py")):
        for line in text_of(path).splitlines():
            match = PRAGMA.search(line)
            if match:
                assert re.match(r"-- \w+", match["rest"]), (
                    f"{relative(path)}: no reason beside: {line.strip()}"
                )
                marked.append(f"{relative(path)}: {line.strip()}")
    listed = [
        line
        for line in (ROOT / "tests" / "not_covered.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert sorted(marked) == sorted(listed)


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_readme_documents_the_public_names():
    documented = set(re.findall(r"\bsb\.([A-Za-z_]\w*)", README.read_text()))
    public = set(sb.__all__) - {"__version__"}
    assert documented == public, (
        f"only in the README: {documented - public}; only in __all__: {public - documented}"
    )


def test_public_names_exist_and_say_what_they_are():
    for name in sb.__all__:
        value = getattr(sb, name)
        assert name == "__version__" or value.__doc__, f"sparse_bwd.{name} has no docstring"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_result_files(page):
    text = (ROOT / page).read_text()
    assert "<!-- results:" in text and filled(text) == text, "run `make results`"


def test_readme_tables_are_filled_from_files(tmp_path):
    text = "before\n<!-- results:accuracy -->\nold\n<!-- /results:accuracy -->\nafter\n"
    assert filled(text, tmp_path) == text.replace("old\n", "")
    with pytest.raises(ValueError, match="results:unheard"):
        filled(text.replace("accuracy", "unheard"), tmp_path)
