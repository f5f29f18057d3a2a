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
