"""The files as documents: each opens with its story, no flag is ignored, nothing reaches backwards."""

import ast
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import common

import pytest

import model
import rollout

ROOT = Path(common.__file__).parent
READING_ORDER = ("env", "data", "model", "rollout", "train_sft", "train_rl", "eval")
SCRIPTS = [name for name in READING_ORDER if name != "env"]
PREPARE = sorted(path.stem for path in (ROOT / "prepare").glob("*.py") if "cli(main" in path.read_text())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = sorted([*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("bench/*.py")])
sys.path.insert(0, str(ROOT / "prepare"))


def read(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


@pytest.mark.parametrize("name", READING_ORDER)
def test_each_file_opens_with_its_story_its_command_and_what_to_read_next(name):
    story = ast.get_docstring(ast.parse(read(name)))
    following = (*READING_ORDER, "README")[READING_ORDER.index(name) + 1]
    assert f"$ python {name}.py" in story and re.search(rf"Read next: {following}\.(py|md)", story)


@pytest.mark.parametrize("name", [*SCRIPTS, *PREPARE])
def test_each_command_has_a_help_page_that_explains_every_flag(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        common.cli(module.main, module.Config, getattr(module, "PRESETS", None))
    assert not stop.value.code and "--out" in capsys.readouterr().out + "--out" * (name == "model")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_of_a_configuration_is_used(name):
    module = importlib.import_module(name)
    passed = {*inspect.signature(model.load_policy).parameters, *model.Protocol.__dataclass_fields__}
    passed |= (
        {*inspect.signature(rollout.rollout).parameters} if "rollout_flags(cfg)" in read(name) else set()
    )
    for field in module.Config.__dataclass_fields__:
        shared = re.search(rf"\bcfg\.{field}\b", read("common")) is not None
        assert re.search(rf"\bcfg\.{field}\b", read(name)) or field in passed or shared, (
            f"--{field} is never read"
        )


@pytest.mark.parametrize("name", READING_ORDER)
def test_a_file_imports_only_files_that_come_before_it(name):
    allowed = {*READING_ORDER[: READING_ORDER.index(name)], *(() if name == "env" else ("common",))}
    ours = {*READING_ORDER, "common", "endpoint", "prepare", "bench", "shared", "formats"}
    for node in ast.walk(ast.parse(read(name))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        late = isinstance(node, ast.ImportFrom) and node.col_offset > 0 and node.module == "endpoint"
        assert late or not ({*modules} & ours) - allowed, f"line {node.lineno}: imports {modules}"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.stem)
def test_nothing_dangerous_is_called_and_no_error_is_swallowed_whole(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called, arguments = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads"), (
                where
            )
            assert arguments.get("shell", "False") == "False", where
            assert called != "torch.load" or arguments.get("weights_only") == "True", where
        if isinstance(node, ast.ExceptHandler):
            assert node.type and ast.unparse(node.type) not in ("Exception", "BaseException"), where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:bench|prepare|tests|docs)/\w+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def list_commands() -> list[tuple[str, ...]]:
    """Every `python SCRIPT.py ...` of ours that the pages show, as words."""
    commands = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        shown = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
        shown += "\n" + "\n".join(re.findall(r"`(python [^`\n]+)`", text))
        parts = [part.strip() for line in shown.splitlines() for part in line.split("&&")]
        words = [shlex.split(part, comments=True) for part in parts if part.startswith("python ")]
        commands += [tuple(w[1:]) for w in words if w[1].endswith(".py") and (ROOT / w[1]).exists()]
    return sorted(set(commands))


@pytest.mark.parametrize("command", list_commands(), ids=" ".join)
def test_each_command_of_the_pages_is_understood(command, monkeypatch):
    """Presets and flags are those that exist; nothing is run."""
    script, *_ = command
    if script == "env.py":
        return
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    module = importlib.import_module(Path(script).stem)
    monkeypatch.setattr(sys, "argv", list(command))
    cfg = common.cli(lambda cfg: cfg, module.Config, getattr(module, "PRESETS", None))
    assert isinstance(cfg, module.Config)


def test_the_pages_show_every_script():
    assert {command[0].removesuffix(".py") for command in list_commands()} >= {
        "train_sft",
        "train_rl",
        "eval",
        "data",
    }


def test_the_readme_is_short_and_shows_the_loss_as_it_stands_in_the_code():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1_200
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    code = [line.strip() for line in read("train_rl").splitlines()]
    for line in block.splitlines():
        assert line.partition("  #")[0].strip() in [stripped.partition("  #")[0] for stripped in code], line
