"""The rules that all files keep: each can be copied alone, importing runs nothing, same name means same code."""

import ast
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

CONCEPTS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
REQUIRED = {"torch", "numpy", "tiktoken"}
COMES_WITH = {"regex"}  # tiktoken requires it
TOP = "train"


def tree_of(stem):
    return ast.parse(CONCEPTS[stem].read_text())


def imported(node):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("stem", CONCEPTS)
def test_module_level_imports_are_torch_numpy_tiktoken_and_the_standard_library(stem):
    for node in tree_of(stem).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            foreign = imported(node) - REQUIRED - COMES_WITH - set(sys.stdlib_module_names)
            assert stem == TOP or not foreign, f"{stem}.py:{node.lineno} imports {foreign}"
            assert not (stem == TOP and foreign - set(CONCEPTS))


def test_importing_any_file_prints_nothing_and_leaves_torch_as_it_was():
    code = ("import sys, torch\n"
            "def state(): return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), "
            "torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.cuda.is_initialized()\n"
            "before = state()\n"
            "for name in sys.argv[1:]:\n"
            "    __import__(name)\n"
            "    assert state() == before, name\n")
    found = subprocess.run([sys.executable, "-W", "error", "-c", code, *CONCEPTS], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("stem", CONCEPTS)
def test_a_header_says_idea_shapes_run_and_test(stem):
    header = ast.get_docstring(tree_of(stem))
    for word in ("Idea", "Shapes", "Omits", "Run", "Test"):
        assert re.search(rf"^{word}\b", header, re.MULTILINE), f"{stem}.py: no {word}"
    assert (ROOT / re.search(r"^Test\s+pytest (\S+)", header, re.MULTILINE)[1]).exists()


@pytest.mark.parametrize("stem", CONCEPTS)
def test_public_functions_and_classes_say_what_they_do(stem):
    for node in tree_of(stem).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node) or node.end_lineno - node.lineno <= 8, f"{stem}.py: {node.name}"


@pytest.mark.parametrize("stem", CONCEPTS)
def test_every_flag_says_what_it_is_and_its_default(stem):
    demo_elsewhere = {"rlhf": "overoptimisation", "zero": "zero_memory", "train": "config"}
    assert "ArgumentParser" in CONCEPTS[demo_elsewhere.get(stem, stem)].read_text(), f"python {stem}.py --help explains nothing"
    for call in ast.walk(tree_of(stem)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("add_argument"):
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert options.get("help"), f"{stem}.py:{call.lineno} has no help"
            if options.get("default", "None") != "None" and re.match("f?['\"]", options["help"]):
                assert "default" in options["help"], f"{stem}.py:{call.lineno}: which default?"


def test_functions_of_the_same_name_are_the_same():
    """A few lines that two files need stand in both; then they must not drift apart."""
    copies = defaultdict(dict)
    for stem in CONCEPTS:
        for node in tree_of(stem).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
                copies[node.name][stem] = ast.dump(node)
    # The same word for another thing: checkpoints and tokenizers are both saved and loaded.
    for name, by_stem in copies.items():
        assert name in {"save", "load", "train"} or len(set(by_stem.values())) == 1, f"{name} differs between {sorted(by_stem)}"


def test_every_file_but_the_top_works_when_copied_alone(tmp_path):
    alone = sorted(set(CONCEPTS) - {TOP})
    for stem in alone:
        (tmp_path / stem).mkdir()
        (tmp_path / stem / f"{stem}.py").write_text(CONCEPTS[stem].read_text())
    code = ("import importlib, sys\n"
            "for stem in sys.argv[1:]:\n"
            "    sys.path.insert(0, stem)\n"
            "    importlib.import_module(stem)\n"  # the others are in other folders: not to be found
            "    del sys.modules[stem], sys.path[0]\n")
    found = subprocess.run([sys.executable, "-c", code, *alone], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_lines_are_short_and_nothing_is_left_to_do():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("bench/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= (120 if path.parent == ROOT else 160), f"{path.name}:{number}"
            assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", line), f"{path.name}:{number}"
