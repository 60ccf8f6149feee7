"""Limits of size: of a file, of a function, and of what makes a frame, which docs/architecture.md lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "csrc", "kernels", "recipes", "rfengine", "studies")
MOST_LINES, MOST_FUNCTION_LINES = 450, 60
MOST_FRAME_LINES = 4604


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".c") and "__pycache__" not in path.parts:
                yield path


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def is_jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_file_is_too_long() -> None:
    long = {str(path.relative_to(ROOT)): lines_of(path) for path in sources() if lines_of(path) > MOST_LINES}
    assert long == {}


def test_no_function_is_too_long() -> None:
    long = {}
    for path in sources():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_jit(node):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}


def test_what_makes_a_frame_can_be_read_in_a_sitting() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"^## What makes a frame$(.+?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    files = re.findall(r"^(rfengine/\S+\.py) ", section, re.MULTILINE)
    assert len(files) == len(set(files)) and len(files) >= 15
    assert sum(lines_of(ROOT / name) for name in files) <= MOST_FRAME_LINES
