"""The files as documents: each opens with its story, every command works, nothing reaches backwards.

Lines worth flipping, each with the test that then fails:
    eval.py      a field of Config that nobody reads    -> every_flag_is_used_and_explained
    data.py      `import model`                         -> a_file_imports_only_files_that_come_before_it
    train_rl.py  `import endpoint` at the top           -> a_file_imports_only_files_that_come_before_it
    common.py    torch.load without weights_only        -> nothing_dangerous_is_called_...
    README.md    --steps 4x, --stepz 4                  -> every_command_that_is_shown_is_understood
"""

import ast
import functools
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import common

import pytest
import tyro

import data
import model
import rollout

ROOT = Path(common.__file__).parent
READING_ORDER = ("env", "data", "model", "rollout", "train_sft", "train_rl", "eval")
PYTHON = sorted(file for folder in (".", "prepare", "bench") for file in ROOT.glob(f"{folder}/*.py"))
COMMANDS = {str(file.relative_to(ROOT)): file for file in PYTHON if "__main__" in file.read_text()}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
UNEXPLAINED = {"seed", "kinds", "temperature", "weight_decay", "clip_high"}  # flags whose name says it all


def read(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def parse(monkeypatch, script: str, *words: str) -> object:
    """The configuration that a command gives its script; nothing is run."""
    monkeypatch.syspath_prepend(str(COMMANDS[script].parent))
    module = importlib.import_module(COMMANDS[script].stem)
    monkeypatch.setattr(sys, "argv", [script, *words])
    if script == "env.py":  # the one script without common.py
        return tyro.cli(functools.wraps(module.main)(lambda *_, **__: True))
    return common.cli(lambda cfg: cfg, module.Config, getattr(module, "PRESETS", None))


@pytest.mark.parametrize("name", READING_ORDER)
def test_each_file_opens_with_its_story_its_command_and_what_to_read_next(name):
    story = ast.get_docstring(ast.parse(read(name)))
    following = (*READING_ORDER, "README")[READING_ORDER.index(name) + 1]
    assert f"$ python {name}.py" in story and re.search(rf"Read next: {following}\.(py|md)", story)


@pytest.mark.parametrize("script", COMMANDS)
def test_each_script_has_a_help_page(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, script, "--help")
    assert not stop.value.code and f"usage: {script}" in capsys.readouterr().out


@pytest.mark.parametrize("name", READING_ORDER[1:])
def test_every_flag_is_used_and_explained(name):
    text = read(name)
    taken = {*inspect.signature(model.load_policy).parameters, *model.Protocol.__dataclass_fields__}
    taken = taken if "policy_flags(cfg)" in text else set()
    taken |= {*inspect.signature(rollout.rollout).parameters} if "rollout_flags(cfg)" in text else set()
    taken |= {*data.ProbeFlags.__dataclass_fields__} if "draw_probes(" in text else set()
    (config,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == "Config"]
    for field in [node for node in config.body if isinstance(node, ast.AnnAssign)]:
        flag, lines = field.target.id, text.splitlines()[field.lineno - 2 : field.end_lineno]
        used = re.search(rf"\b(cfg|self)\.{flag}\b", text) or re.search(rf"\bcfg\.{flag}\b", read("common"))
        assert used or flag in taken, f"--{flag} is never read"
        explained = "#" in "".join(lines[1:]) or lines[0].strip().startswith("#")
        assert explained or flag in UNEXPLAINED, f"--{flag} has no help"


@pytest.mark.parametrize("name", READING_ORDER)
def test_a_file_imports_only_files_that_come_before_it(name):
    """common.py comes after env.py. endpoint.py is imported where it is used; prepare/ and bench/ nowhere."""
    allowed = {*READING_ORDER[: READING_ORDER.index(name)], "common"} - {"common" if name == "env" else ""}
    ours = {file.stem for file in PYTHON} | {"prepare", "bench"}
    for node in ast.walk(ast.parse(read(name))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        late = {"endpoint"} if getattr(node, "col_offset", 0) and name in ("train_rl", "eval") else set()
        modules = {name.partition(".")[0] for name in names}
        assert not modules & ours - allowed - late, f"line {node.lineno}: imports {modules}"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.stem)
def test_nothing_dangerous_is_called_and_no_error_is_swallowed_whole(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called, arguments = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__"), where
            assert not called.startswith("pickle.") and arguments.get("shell", "False") == "False", where
            assert called != "torch.load" or arguments.get("weights_only") == "True", where
        if isinstance(node, ast.ExceptHandler):
            assert node.type and not re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)), where


def shown_commands() -> list[tuple[str, ...]]:
    """Every `python FILE.py ...` in the pages, in blocks and lines, and in the stories of files, as words."""
    shown = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        shown += "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
        shown += re.findall(r"`(python [^`\n]+)`", text)
    for file in COMMANDS.values():
        shown += re.findall(r"(?m)\$ (python .*?)(?:  |$)", ast.get_docstring(ast.parse(file.read_text())))
    parts = [shlex.split(part, comments=True) for line in shown for part in line.split("&&")]
    return sorted({tuple(words[1:]) for words in parts if words[:1] == ["python"] and words[1] != "-m"})


@pytest.mark.parametrize("command", shown_commands(), ids=" ".join)
def test_every_command_that_is_shown_is_understood(command, monkeypatch):
    assert parse(monkeypatch, *command)


def test_the_pages_show_every_script():
    assert {command[0] for command in shown_commands()} == {*COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:bench|prepare|tests|docs)/\w+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_shows_the_loss_as_it_stands_in_the_code():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1_200
    code = {line.split("  #")[0].strip() for line in read("train_rl").splitlines()}
    for line in re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1].splitlines():
        assert line.split("  #")[0].strip() in code, line
