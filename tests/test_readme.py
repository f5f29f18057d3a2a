"""The README names what there is: every file, every function or class, every test."""

import ast
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def names_in(path):
    """Top-level names, and Class.attribute."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                names.add(f"{node.name}.{inner.name}")
    return names


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`(\w+\.py:[\w.]+)`", README))))
def test_every_name_in_the_lecture_map_exists(place):
    file, name = place.split(":")
    assert name in names_in(ROOT / file), place


def test_every_file_is_in_the_table_and_the_other_way_round():
    table = README[README.index("## The files"):README.index("## Lecture map")]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`((?:tests|bench)/\w+\.\w+)`", README))))
def test_every_test_that_is_named_exists(file):
    assert (ROOT / file).exists()


def needs(path):
    """Other files of ours that a file imports, anywhere but in its demo."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            in_demo = isinstance(child, ast.FunctionDef) and child.name in ("main", "_demo", "demo", "_train", "show_fit")
            if in_demo or isinstance(child, ast.If) and re.search("__main__|TYPE_CHECKING", ast.unparse(child.test)):
                continue
            names = [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
            found.update([*names, child.module] if isinstance(child, ast.ImportFrom) else names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return {f"{name}.py" for name in found} & {other.name for other in ROOT.glob("*.py")} - {path.name}


COPY = README[README.index("## Copy this"):README.index("## On your machines")]


@pytest.mark.parametrize("row", [line for line in COPY.splitlines() if line.startswith("| `")], ids=lambda row: row[2:20])
def test_what_is_to_be_copied_is_all_that_is_needed(row):
    files, imported, beside = (re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|"))
    wanted = set().union(*(needs(ROOT / file) for file in files)) - set(files)
    assert wanted <= {name for name in beside if name.endswith(".py")}
    named = set().union(*(names_in(ROOT / file) for file in (*files, *(b for b in beside if b.endswith(".py")))))
    assert any(re.match(r"\w+", use)[0] in named for use in imported)


def test_only_what_is_said_to_need_tiktoken_imports_it():
    """At module level; torch and numpy are all that the other files to copy need."""
    need, regex = (set(re.findall(r"`(\w+\.py)`", part))
                   for part in re.search(r"\(([^()]*) need\s+tiktoken, ([^()]*) the regex that", COPY).groups())
    files = set(re.findall(r"`(\w+\.py)`", COPY))
    modules = {file: {name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
                      for name in [alias.name for alias in node.names] + [getattr(node, "module", "")]} for file in files}
    assert {file for file in files if "tiktoken" in modules[file]} == need
    assert {file for file in files if "regex" in modules[file]} - need == regex


def test_every_figure_is_there_with_the_command_that_makes_it():
    import runpy
    commands = runpy.run_path(str(ROOT / "docs" / "figures.py"))["FIGURES"]
    shown = re.findall(r"!\[\]\(docs/(\w+)\.png\)[^`]*`([^`]+)`", README)
    assert dict(shown) == commands
    assert all((ROOT / "docs" / f"{name}.png").stat().st_size < 200_000 for name in commands)
