"""The README's table "What it survives", made from the tests: each row is a mark on the test that shows it.

$ python tests/survives.py            # prints the table; test_docs.py compares it with the README
"""

import ast
from pathlib import Path

AREAS = ("model output", "answers", "files", "faults")


def marks(file: Path) -> list[tuple[str, str, str]]:
    """(area, what comes, what happens) of each `@pytest.mark.survives` on a test of this file, in order."""
    decorators = [
        decorator
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if node.name.startswith("test_")
    ]
    return [
        tuple(ast.literal_eval(value) for value in decorator.args)
        for decorator in decorators
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.survives"
    ]


def table() -> str:
    """The table in Markdown, by area."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    rows = [(*mark, file.name) for file in files for mark in marks(file)]
    unknown = {row[0] for row in rows} - set(AREAS)
    assert not unknown, f"an area is one of {AREAS}, not {unknown}"
    rows.sort(key=lambda row: AREAS.index(row[0]))
    return "\n".join(
        [
            "| | what comes | what happens | shown by |",
            "|---|---|---|---|",
            *(f"| {area} | {what} | {outcome} | `{file}` |" for area, what, outcome, file in rows),
        ]
    )


if __name__ == "__main__":
    print(table())
