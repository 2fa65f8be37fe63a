"""The house rules that a reader can't see in one file: who imports whom, file sizes, what is not used and where."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST
from tests.support import ROOT

PACKAGE = ROOT / "dalle_jax"

# Lowest first. A unit imports only from levels below its own; units of one level never see each other.
LEVELS = (
    {"errors", "files"},
    {"pixels", "attention_pattern", "layout", "diffusion", "pictures"},
    {"config", "text", "sharding", "distributed", "signals"},
    {"checkpoint", "mesh"},
    {"models", "data"},
    {"model_dir"},
    {"train", "sample", "convert"},
    {"evaluate", "preflight", "serve"},
    {"configs"},  # a config reads the defaults of what it configures, and is loaded by its path
    {"cli"},
)
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}
MAX_LINES = 400
MAX_IGNORES = 30  # of mypy
# Units that may import a library at all; everybody else must not know it is there.
ONLY_IN = {
    "torch": {"convert"},
    "flax": {"models", "model_dir", "convert"},  # parameters: their definition, their flat names, others' files
    "msgpack": {"convert"},
    "jax": {
        "sharding",
        "mesh",
        "checkpoint",
        "distributed",
        "models",
        "train",
        "sample",
        "convert",
        "evaluate",
        "preflight",
        "cli",
    },
    "grain": {"data"},
    "sentencepiece": {"text"},
    "tokenizers": {"text"},
    "ftfy": {"text"},
    "emoji": {"text"},
    "unidecode": {"text"},
    "orbax": {"checkpoint"},
    "etils": {"checkpoint"},
    "tensorflow_datasets": {"data"},
}
# NNX defines modules and nothing else: state is nested dicts, transforms are JAX's.
NNX_ALLOWED = {
    "Module", "Variable", "Param", "Rngs", "List", "split", "merge", "state", "eval_shape", "to_pure_dict",
    "replace_by_pure_dict",
}  # fmt: skip
# Compiled where arrays are made, updated, drawn for the log or decoded; a jit anywhere else hides a compilation.
MAY_JIT = {
    "checkpoint/manager.py",  # the copy that is written
    "cli/encode.py",
    "train/step.py",
    "train/optimizer/powersgd.py",  # the form in which checkpoints hold what was left out
    "train/monitor/replicas.py",
    "train/objectives/dvae.py",
    "train/objectives/vq.py",
    "evaluate/features.py",
    "evaluate/overlap.py",
    "evaluate/reconstructor.py",
    "sample/engine.py",
    "sample/image_tokenizer.py",
    "sample/rerank.py",
}


def unit_of(path: Path) -> str:
    """'models' for dalle_jax/models/dvae.py, 'layout' for dalle_jax/layout.py, 'configs' for configs/base.py."""
    if path.is_relative_to(ROOT / "configs"):
        return "configs"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE_SOURCES = sources("dalle_jax", "configs")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module) -> list[tuple[str, int]]:
    """Every imported module as a dotted name with its line, inside functions too; `from a import b` gives 'a.b'."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import, write it in full"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def dotted(node: ast.expr) -> str:
    """'nnx.jit' for the expression nnx.jit; '' for anything that is not a chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def wrong_imports(unit: str, tree: ast.Module) -> list[str]:
    """What this unit imports of the package although it is not below it."""
    wrong = []
    for name, line in imported(tree):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first != "dalle_jax" or target in ("", "__version__", unit):
            continue
        if target not in LEVEL or LEVEL[target] >= LEVEL[unit]:
            wrong.append(f"line {line}: {unit} imports {name}")
    return wrong


def test_every_unit_has_a_level():
    units = {unit_of(path) for path in PACKAGE_SOURCES} - {"__init__"}
    assert units <= LEVEL.keys(), f"give {units - LEVEL.keys()} a level, here and in CONTRIBUTING.md"


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    unit = unit_of(path)
    if unit == "__init__":
        public = {"sample.pipeline.Pipeline", "sample.image_tokenizer.ImageTokenizer"}
        assert {name for name, _ in imported(parse(path))} == {f"dalle_jax.{name}" for name in public}
        return
    wrong = wrong_imports(unit, parse(path))
    assert not wrong, "\n".join(wrong)


def test_the_map_in_contributing_is_the_levels():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("| units, lowest first |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in text.splitlines()[2:]]
    assert [set(row) for row in rows] == [set(level) for level in LEVELS]


def test_the_import_check_finds_what_it_should():
    def check(unit, code):
        return bool(wrong_imports(unit, ast.parse(code)))

    assert check("data", "from dalle_jax.models import dvae")  # a sibling
    assert check("layout", "def f():\n    import dalle_jax.text")  # upwards, hidden in a function
    assert check("models", "from dalle_jax import train")
    assert not check("train", "from dalle_jax import layout\nfrom dalle_jax.train.step import State\nimport jax")


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_where_they_belong(path):
    unit = unit_of(path)
    for name, line in imported(parse(path)):
        library = name.partition(".")[0]
        assert unit in ONLY_IN.get(library, {unit}), f"line {line}: {unit} imports {library}"


@pytest.mark.parametrize("unit", ["errors", "pixels", "attention_pattern", "layout", "diffusion"])
def test_facts_need_numpy_at_most(unit):
    libraries = {name.partition(".")[0] for name, _ in imported(parse(PACKAGE / f"{unit}.py"))}
    assert libraries <= {
        "collections",
        "contextlib",
        "numpy",
        "dataclasses",
        "functools",
        "math",
        "numbers",
        "re",
        "sys",
        "typing",
        "dalle_jax",
    }


def test_models_do_no_input_or_output():
    for path in sources("dalle_jax/models"):
        tree = parse(path)
        libraries = {name.partition(".")[0] for name, _ in imported(tree)}
        assert not libraries & {"os", "io", "pathlib", "PIL", "json", "safetensors", "orbax", "logging"}, path.name
        calls = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"open", "print"}, path.name


def test_only_the_agreed_part_of_nnx():
    for path in PACKAGE_SOURCES:
        for node in ast.walk(parse(path)):
            name = dotted(node) if isinstance(node, ast.Attribute) else ""
            if name.startswith("nnx."):
                assert name.split(".")[1] in NNX_ALLOWED, f"{path.name} line {node.lineno}: {name}"
            assert not name.endswith((".sow", "nnx.pop")), f"{path.name} line {node.lineno}: {name}"
            if isinstance(node, ast.keyword):
                assert node.arg != "out_sharding", f"{path.name} line {node.value.lineno}: out_sharding="


def test_jit_only_where_it_is_agreed():
    """A file that compiles is listed, and a listed file compiles."""
    compiled = set()
    for path in sources("dalle_jax"):
        if any(isinstance(node, ast.Attribute) and dotted(node) == "jax.jit" for node in ast.walk(parse(path))):
            compiled.add(str(path.relative_to(PACKAGE)))
    assert compiled == MAY_JIT


def test_the_long_tests_that_go_first_exist():
    assert {f"test_{name}.py" for name in LONGEST_FIRST} <= {path.name for path in sources("tests")}


def test_no_long_files_and_no_drawers():
    for path in sources("dalle_jax", "configs", "tests", "benchmarks", "launch"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines: it is two rooms"
        assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py"), path


def test_few_lines_are_kept_from_the_type_checker():
    """Each with its reason."""
    ignored = [line for path in PACKAGE_SOURCES for line in path.read_text().splitlines() if "# type: ignore" in line]
    assert len(ignored) <= MAX_IGNORES and all(re.search(r"# type: ignore\[[\w, -]+\]  # \w", line) for line in ignored)


def test_every_module_says_what_it_is():
    for path in sources("dalle_jax", "configs", "tests", "benchmarks"):
        tree = parse(path)
        assert ast.get_docstring(tree) or not tree.body, f"{path.relative_to(ROOT)} has no docstring"


def test_no_registry_hosts():
    """An address of a package index in a tracked file ties the project to one machine's network."""
    host = re.compile(
        r"(?:[\w.-]*py[p]i[\w-]*\.\w+|pythonho[s]ted\.\w+|download\.pytor[c]h\.\w+)/|--(?:extra-)?index-u[r]l"
    )
    folders = ("dalle_jax", "configs", "tests", "benchmarks", "launch", "docs", ".ci")
    files = [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".cfg", ".txt")]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in files:
        if path.suffix in (".py", ".md", ".toml", ".cfg", ".txt", ".sh", ".yaml", ".json", ""):
            if path.is_file():
                assert not host.search(path.read_text(encoding="utf-8")), path
    assert host.search("https://py" + "pi.org/simple")


def test_every_package_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert listed == {str(path.relative_to(ROOT)).replace("/", ".") for path in folders} | {"dalle_jax.configs"}


def test_dependencies_are_what_is_imported():
    """Nothing is imported that the metadata does not ask for, and nothing is asked for that is not used."""
    package_of = {"PIL": "pillow", "absl": "absl-py", "gcld3": "cld3-py", "orbax": "orbax-checkpoint"}
    package_of |= dict.fromkeys(("torch", "ftfy", "tokenizers", "emoji", "unidecode"))  # in extras
    ours = {"dalle_jax"} | sys.stdlib_module_names
    libraries = {name.partition(".")[0] for path in PACKAGE_SOURCES for name, _ in imported(parse(path))} - ours
    needed = {package_of.get(library, library.replace("_", "-")) for library in libraries} - {None}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unasked = {"importlib-resources"}  # tensorflow-datasets imports it without asking for it
    assert needed | unasked == {line.partition(">=")[0] for line in project["dependencies"]}


def test_constraints_satisfy_the_metadata():
    """The tested set holds every direct dependency on every Python, and none below its lower bound."""
    pattern = re.compile(r"^([\w-]+)==([\d.]+)(?:; python_version (<|>=) \"3\.12\")?$", re.MULTILINE)
    lines = pattern.findall((ROOT / "constraints.txt").read_text())
    older, newer = ({name.lower(): v for name, v, python in lines if python != other} for other in (">=", "<"))
    for tested in (older, newer):
        _satisfies_the_metadata(tested)


def _satisfies_the_metadata(tested):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = ("test", "clip", "captions", "convert", "docs")
    extras = [line for name in names for line in project["optional-dependencies"][name]]
    for line in project["dependencies"] + extras:
        name, _, bound = line.lower().partition(">=")
        number = [[int(part) for part in version.split(".")] for version in (tested[name], bound)]
        assert number[0] >= number[1], line


def test_first_lines_of_docstrings_stand_alone():
    """They are sentences or noun phrases, no fragments that lean on the name above them."""
    leaning = {"What", "Which", "How", "Of", "Does", "Do", "Is", "Are"}
    for path in PACKAGE_SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = text.splitlines()[0]
                assert first.split()[0] not in leaning, f"{path.name}: {first}"
