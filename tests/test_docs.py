"""The files as documents: each opens with its story and its command, no flag is ignored, nothing reaches backwards."""
import ast
import importlib
import inspect
import io
import re
import runpy
import shlex
import sys
import tokenize
from pathlib import Path

import pytest

import model
import data
import survives

ROOT = Path(__file__).resolve().parent.parent
READING_ORDER = ("env", "data", "model", "rollout", "train_sft", "train_rl", "eval")
SCRIPTS = [ROOT / f"{name}.py" for name in READING_ORDER]
PYTHON = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])


def names(paths):
    return [path.name for path in paths]


def config_fields(path: Path, classes: str = "Config") -> list[tuple[str, str]]:
    """(name, source line) of each field of the script's Config, or of its `*Flags` that others inherit; [] without."""
    text = path.read_text()
    found = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name.endswith(classes)]
    return [(field.target.id, text.splitlines()[field.end_lineno - 1])
            for node in found for field in node.body if isinstance(field, ast.AnnAssign)]


WITH_CONFIG = [path for path in SCRIPTS if config_fields(path)]


def test_the_files_are_those_of_the_reading_order():
    assert {path.stem for path in ROOT.glob("*.py")} == set(READING_ORDER)


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_each_file_opens_with_its_story_its_command_and_what_to_read_next(path):
    story = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"$ python {path.name}" in story and "Read next: " in story
    following = (*READING_ORDER, "README")[READING_ORDER.index(path.stem) + 1]
    assert re.search(rf"Read next: {following}\.(py|md)", story)
    assert len(story.splitlines()[0]) <= 120 and story.splitlines()[0].endswith((".", "?"))


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_the_command_of_each_file_has_a_help_page(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert not stop.value.code
    page = capsys.readouterr().out
    for field, _ in config_fields(path):
        assert f"--{field.replace('_', '-')}" in page


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_the_flags_in_the_story_exist(path):
    story = ast.get_docstring(ast.parse(path.read_text()))
    known = {name for name, _ in config_fields(path)}
    known |= {name for other in SCRIPTS for name, _ in config_fields(other, "Flags")} if known else set()
    for command in re.findall(rf"\$ python {re.escape(path.name)}(.*)", story):
        flags = re.findall(r"--([\w-]+)", command.partition(" #")[0])
        assert not known or {flag.replace("-", "_") for flag in flags} <= known


@pytest.mark.parametrize("path", WITH_CONFIG, ids=names(WITH_CONFIG))
def test_every_field_of_a_configuration_is_used_and_explained(path):
    text = path.read_text()
    help_texts = " ".join(line.partition("#")[2] for _, line in config_fields(path))
    for name, line in config_fields(path):
        assert re.search(rf"\bcfg\.{name}\b", text), f"{path.name}: --{name} is never read"
        known = name in ("seed", "kinds", "temperature", "weight_decay") or name in help_texts     # as clip_high is
        assert "#" in line or known, f"{path.name}: --{name} has no help"


def test_every_inherited_flag_reaches_the_policy_or_is_used_and_is_explained():
    taken = inspect.signature(model.load_policy).parameters
    for path in SCRIPTS:
        for name, line in config_fields(path, "Flags"):
            assert name in taken or re.search(rf"\bcfg\.{name}\b", path.read_text()), f"{path.name}: --{name}"
            assert "#" in line or name == "max_pixels", f"{path.name}: --{name} has no help"


def test_the_training_scripts_and_the_evaluation_are_commands():
    assert {"rollout", "train_sft", "train_rl", "eval"} <= {path.stem for path in WITH_CONFIG}


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_a_file_imports_only_files_that_come_before_it(path):
    before = READING_ORDER[:READING_ORDER.index(path.stem)]
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) else [])
        for module in modules:
            assert module not in READING_ORDER or module in before, f"line {node.lineno}: imports {module}"


@pytest.mark.parametrize("path", PYTHON, ids=names(PYTHON))
def test_lines_are_short_and_end_clean(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= (140 if path.parent.name == "tests" else 120), f"{path.name}:{number} has {len(line)} columns"
        assert line == line.rstrip() and "\t" not in line, f"{path.name}:{number} has stray white space"


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_nothing_dangerous_is_called(path):
    """No eval or exec, no pickle, no shell, nothing imported by name, and no error swallowed whole."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), where
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve"} & set(modules), where
        if isinstance(node, ast.Call):
            assert not any(k.arg == "shell" and getattr(k.value, "value", True) for k in node.keywords), where
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and getattr(k.value, "value", False) for k in node.keywords), where
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException"), where


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_not_even_the_words_are_there(path):
    found = re.findall(r"eval\(|exec\(|pickle|except( Exception)?:|shell=True", path.read_text())
    assert not found


def test_the_table_of_what_it_survives_is_that_of_the_tests():
    assert survives.table() in (ROOT / "README.md").read_text(), "python tests/survives.py prints the table as it is now"
    assert len(survives.table().splitlines()) > 20


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, no comments, no docstrings."""
    text, kept = path.read_text(), set()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            kept.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            kept -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(kept)


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_the_readme_counts_the_lines_of_each_file_right(path):
    row = re.search(rf"\| `{path.name}` \|.*\| (\d+) \|", (ROOT / "README.md").read_text())
    assert int(row[1]) == code_lines(path)


def test_every_picture_and_file_that_the_readme_names_is_there():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", readme) + re.findall(r"`(tests/\w+\.py|docs/\w+)`", readme):
        assert (ROOT / name).exists(), name


def readme_commands() -> list[list[str]]:
    """Every `python SCRIPT.py ...` that the README shows, in blocks and in lines, as words."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    shown = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [part for block in shown for line in block.splitlines() for part in line.split("&&")]
    lines += [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w[:1] == ["python"] and w[1].removesuffix(".py") in READING_ORDER[1:] and "..." not in w]


def test_the_readme_shows_commands():
    assert len(readme_commands()) > 20 and {command[1] for command in readme_commands()} == {
        f"{name}.py" for name in READING_ORDER[1:]}


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_each_command_of_the_readme_is_understood(command, monkeypatch):
    """Presets and flags are those that exist; nothing is run."""
    script = importlib.import_module(command[1].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", command[1:])
    assert isinstance(data.command(lambda cfg: cfg, script.Config, getattr(script, "PRESETS", None)), script.Config)
