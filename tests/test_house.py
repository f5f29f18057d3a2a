"""The rules that all files keep: each can be copied alone, importing runs nothing, same name means same code."""

import ast
import functools
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


@functools.cache
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


def test_every_file_but_the_top_works_alone_and_importing_prints_nothing_and_leaves_torch_as_it_was(tmp_path):
    """Each is imported from a folder of its own, from where the others are not to be found; the top from where they are."""
    for stem in sorted(set(CONCEPTS) - {TOP}):
        (tmp_path / f"only-{stem}").mkdir()
        (tmp_path / f"only-{stem}" / f"{stem}.py").write_text(CONCEPTS[stem].read_text())
    code = ("import os, sys, torch\n"
            "def state(): return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), "
            "torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.cuda.is_initialized()\n"
            "before = state()\n"
            "for file in sys.argv[1:]:\n"
            "    folder, name = os.path.split(file)\n"
            "    sys.path.insert(0, folder)\n"
            "    __import__(name)\n"
            "    assert state() == before, name\n"
            "    del sys.modules[name], sys.path[0]\n")
    files = [*sorted(path.with_suffix("") for path in tmp_path.glob("*/*.py")), ROOT / TOP]
    found = subprocess.run([sys.executable, "-W", "error", "-c", code, *files], cwd=tmp_path, capture_output=True, text=True)
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
    demo_elsewhere = {"flash_attn": "attention_traffic", "rlhf": "overoptimisation", "zero": "zero_memory", "train": "config"}
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


def test_lines_are_short_and_nothing_is_left_to_do():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("bench/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= (120 if path.parent == ROOT else 160), f"{path.name}:{number}"
            assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", line), f"{path.name}:{number}"


# One name for each meaning: what a flag (or a setting of train.py and alignment.py) is not called -> what it is called.
ONE_NAME = {"width": "d_model", "layers": "n_layers", "heads": "n_heads", "kv_heads": "n_kv_heads", "head_width": "d_head",
            "k": "experts_per_token", "new_tokens": "max_new_tokens", "clip": "max_gradient", "save": "out", "output": "out",
            "encoder": "init", "kind": "model", "rounds": "repeats", "smoothing": "label_smoothing",
            "batch_size": "batch", "learning_rate": "lr", "max_steps": "steps"}
PENDING = set()


def test_programs_say_the_same_thing_in_the_same_way():
    """Names of flags, defaults that cannot go stale, a mistake in one line, a file that cannot be read or written, too."""
    wrong = []
    for path in [*CONCEPTS.values(), *sorted(ROOT.glob("bench/*.py"))]:
        name, source = str(path.relative_to(ROOT)), path.read_text()
        if name in PENDING or "ArgumentParser(" not in source:
            continue
        flags = set(re.findall(r"^    (\w+): .*= _?setting\(", source, re.MULTILINE))
        for arguments in re.findall(r"\.add_argument\((.*?)\)\n", source, re.DOTALL):
            call = ast.parse(f"f({arguments})", mode="eval").body
            options = {word.arg: ast.unparse(word.value).strip("'") for word in call.keywords}
            flags.add(ast.unparse(call.args[0]).strip("'-"))
            default = options.get("default", "None")
            if re.fullmatch(r"-?[\d.e]+|\w+", default) and re.search(rf"default:? {re.escape(default)}\b", options["help"]):
                wrong.append(f"{name}: {arguments}: %(default)s, for a literal goes stale")
        wrong += [f"{name}: --{other} is --{ONE_NAME[other]} elsewhere" for other in sorted(flags & set(ONE_NAME))]
        if name in ("config.py", "alignment.py"):
            continue  # their parser raises, and the caller prints
        if 'parser.error = lambda message: parser.exit(2, f"{' not in source:
            wrong.append(f"{name}: a mistake is answered in one line, without the usage")
        if re.search(rf'parser\.exit\(2, f?"{path.name}', source):
            wrong.append(f"{name}: parser.error(...) says the program's name")
        if path.parent == ROOT and not re.search(r"OSError\b.* as error:|start_ranks\(", source):
            wrong.append(f"{name}: a traceback for a file that cannot be written")
    assert not wrong, "\n".join(wrong)


def test_a_flag_that_takes_a_number_takes_one_everywhere():
    """--epochs and --stages are lists of names, too: of sources, and of alignment's stages."""
    numbers, words = defaultdict(set), defaultdict(set)
    for path in CONCEPTS.values():
        for flag, kind in re.findall(r"^    (\w+): (\w+).*= _?setting\(", path.read_text(), re.MULTILINE):
            (numbers if kind in ("int", "float") else words)[flag].add(path.name)
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".add_argument"):
                options = {word.arg: ast.unparse(word.value) for word in call.keywords}
                of_kind = numbers if options.get("type") in ("int", "float") else words
                if "action" not in options:
                    of_kind[ast.unparse(call.args[0]).strip("'-")].add(path.name)
    both = set(numbers) & set(words) - {"epochs", "stages"}
    assert not both, [(flag, numbers[flag], words[flag]) for flag in both]


def test_percentages_are_written_without_a_space():
    for path in [*CONCEPTS.values(), *ROOT.glob("bench/*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.JoinedStr, ast.Constant)):
                text = ast.unparse(node) if isinstance(node, ast.JoinedStr) else str(node.value)
                found = re.search(r"[\d}] %(?! ?[\d(])", text)  # 8 % 3 and %(default)s are something else
                assert not found, f"{path.name}:{node.lineno}: {text}"


def test_a_cure_stands_behind_a_colon_and_seeds_have_one_range():
    """"what: why: what to do about it"; --seed has 32 bits everywhere, as NumPy's frozen stream takes."""
    message = r'^ *(?:raise \w+\()?f?"(?!"").*'
    cure = r"(?:give|check|copy|leave|look|start|take|use|write|run|name|add|choose|convert|save|wait|fetch|point|is (?:this|it))\b"
    wrong = []
    for path in CONCEPTS.values():
        source = "" if path.name in PENDING else path.read_text()
        found = re.findall(rf'{message}; (?:"\n +f?")?{cure}.*|.*--seed .*0 \.\. 2\^(?!32).*', source, re.MULTILINE)
        wrong += [f"{path.name}: {line.strip()}" for line in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("stem", sorted(set(CONCEPTS) - {TOP}))
def test_a_program_expects_that_its_neighbours_may_be_missing(stem):
    source, imports = CONCEPTS[stem].read_text(), (ast.Import, ast.ImportFrom)
    names = set().union(*(imported(node) for node in ast.walk(tree_of(stem)) if isinstance(node, imports)))
    assert not names & set(CONCEPTS) or "ImportError" in source
