"""Imports go one way: the floors of the architecture, held against the import statements of every module."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Each floor's rooms; what rests on it may import them all. Within `pipelines` the files outside a room are
# the leaves that all of its rooms share (errors, files ...), and the loader, which rests on all of them.
KERNELS = ("pipelines.kernels",)
FORMATS = (*KERNELS, "pipelines", "pipelines.formats")
DATASETS = (*FORMATS, "pipelines.datasets")
DECODE = (*DATASETS, "pipelines.decode")
PIPELINES = (*DECODE, "pipelines.augment", "pipelines.convert")
FLOOR_1 = (*PIPELINES, "lvssl.latents", "lvssl.losses", "lvssl.codes")
FLOOR_2 = (*FLOOR_1, "lvssl.settings")
FLOOR_3 = (*FLOOR_2, "lvssl.models")
FLOOR_4 = (*FLOOR_3, "lvssl.runs")
TRAINING = (*FLOOR_4, "lvssl.training")
FLOOR_5 = (*TRAINING, "lvssl.evaluation", "lvssl.report", "lvssl.export", "lvssl.plan")

# Each room and the rooms it may rest on. A room that is not named here is refused: give it a floor first.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "lvssl": (),  # lvssl/__init__.py: importing one room must not load another; it names lvssl.api lazily
    "pipelines.kernels": (),
    "pipelines": PIPELINES,
    "pipelines.formats": FORMATS,
    "pipelines.datasets": DATASETS,
    "pipelines.decode": DECODE,
    "pipelines.augment": (*KERNELS, "pipelines"),
    "pipelines.convert": PIPELINES,
    "tools": PIPELINES,
    "tools.reference": (*PIPELINES, "lvssl.api", "lvssl.commands"),
    "lvssl.latents": KERNELS,
    "lvssl.losses": KERNELS,
    "lvssl.codes": (*KERNELS, "pipelines"),
    "lvssl.settings": FLOOR_1,
    "lvssl.models": FLOOR_2,
    "slurm": FLOOR_2,
    "lvssl.runs": FLOOR_3,
    "lvssl.plan": FLOOR_3,
    "lvssl.training": FLOOR_4,
    "lvssl.evaluation": TRAINING,
    "lvssl.report": TRAINING,
    "lvssl.export": (*TRAINING, "lvssl.evaluation"),
    "lvssl.api": (*TRAINING, "lvssl.evaluation"),
    "lvssl.commands": (*FLOOR_5, "slurm"),
}
# `benchmarks` may import everything, and nothing may import it.
OURS = ("pipelines", "lvssl", "tools", "slurm", "benchmarks")


def room(module: str) -> str:
    """lvssl.models.resnet -> lvssl.models; pipelines.decode.turbo -> pipelines.decode; pipelines.loader ->
    pipelines; lvssl.__version__ -> lvssl."""
    if module == "lvssl.__main__":
        return "lvssl.commands"
    top, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if top == "lvssl":
        return f"lvssl.{name}" if name and not name.startswith("__") else top
    return f"{top}.{name}" if f"{top}.{name}" in MAY_IMPORT else top


def imported(file: Path, package: str) -> list[tuple[int, str]]:
    """(line, module) of every import statement, also inside functions; package resolves relative ones."""
    found = []
    for node in import_statements(file):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            # `from lvssl import training` names the room after `import`, not before it.
            names = (
                [f"{base}.{alias.name}" for alias in node.names] if base in ("lvssl", "pipelines") else [base]
            )
            found += [(node.lineno, name) for name in names]
    return found


@cache
def import_statements(file: Path) -> list[ast.Import | ast.ImportFrom]:
    """Of a module, also inside functions."""
    tree = ast.parse(file.read_text(), filename=str(file))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def modules(root: Path) -> dict[str, Path]:
    """Every module of ours under root by its name; a package's is that of its __init__.py."""
    found = {}
    for package in OURS:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported_files(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, also inside functions: `from lvssl import api`
    means lvssl.api, `from lvssl.api import load` likewise."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in import_statements(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            named = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            found |= {full if full in known else base for full in named.values()}
    return (found & set(known)) - {name}


def circles(root: Path) -> set[frozenset[str]]:
    """Groups of files that reach each other by imports, and so import each other in a circle."""
    known = modules(root)
    graph = {name: imported_files(name, file, known) for name, file in known.items()}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    reach = {name: reached(name) for name in graph}
    return {frozenset(n for n in reach[name] if name in reach[n]) for name in reach if name in reach[name]}


def violations(root: Path) -> list[str]:
    """One line for each import against the rules among the packages under root, with file and line."""
    wrong = []
    for package in OURS[:-1]:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            here = room(module)
            where = file.relative_to(root)
            if here not in MAY_IMPORT:
                wrong.append(f"{where}: {here} has no floor")
                continue
            for line, target in imported(file, module if is_package else module.rpartition(".")[0]):
                there = room(target)
                if there.partition(".")[0] not in OURS or there == here or there in MAY_IMPORT[here]:
                    continue
                if there == "lvssl" and package in ("lvssl", "slurm"):
                    continue  # the bare package, for its version
                wrong.append(f"{where}:{line}: {here} imports {there}")
    return sorted(set(wrong))


def test_imports_go_one_way():
    assert violations(ROOT) == []


def test_a_command_imports_what_measures_and_no_other_command():
    """Of `lvssl.evaluation`: a command's module is one that the command line names."""
    texts = "".join(file.read_text() for file in (ROOT / "lvssl/commands").glob("*.py"))
    named = re.findall(r"lvssl\.evaluation\.(\w+)(?: import|:)", texts)
    shared = ("measures", "stage", "encoder", "embedding")  # what several commands share
    commands = {f"lvssl.evaluation.{name}" for name in named if name not in shared}
    known = modules(ROOT)
    inside = [name for name in known if name.startswith("lvssl.evaluation.")]
    wrong = {name: imported_files(name, known[name], known) & commands for name in inside}
    assert len(commands) > 5 and {name: which for name, which in wrong.items() if which} == {}


def test_no_files_import_each_other_in_a_circle():
    assert circles(ROOT) == set()


def test_a_circle_is_found_through_functions_and_packages(tmp_path):
    plant(
        tmp_path,
        {
            "pipelines/__init__.py": "",
            "pipelines/a.py": "import numpy\nfrom pipelines import b\n",
            "pipelines/b.py": "def f():\n    from .deeper import c\n",
            "pipelines/deeper/__init__.py": "from pipelines import d\n",
            "pipelines/deeper/c.py": "from ..a import g\n",
            "pipelines/d.py": "import pipelines.e\n",
            "pipelines/e.py": "",
        },
    )
    assert circles(tmp_path) == {frozenset({"pipelines.a", "pipelines.b", "pipelines.deeper.c"})}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_forbidden_imports_are_reported(tmp_path):
    plant(
        tmp_path,
        {
            "pipelines/loader.py": "import torch\nfrom lvssl.settings.pretrain import Settings\n",
            "lvssl/losses/ntxent.py": "from pipelines.errors import InputError\n",
            "lvssl/codes/file.py": "def pack():\n    from ..latents import bernoulli\n",
            "lvssl/models/net.py": "from lvssl import training, latents\n",
            "lvssl/report/page.py": "import lvssl.evaluation.probe as probe\n",
            "lvssl/training/pretrain.py": "from slurm.stages import submit\n",
            "slurm/stages.py": "import lvssl.commands.main\n",
            "pipelines/formats/tar.py": "from pipelines.datasets import tars\n",
            "lvssl/oddments.py": "",
            "tools/convert.py": "import benchmarks.loader\nfrom lvssl import __version__\n",
        },
    )
    assert violations(tmp_path) == [
        "lvssl/codes/file.py:2: lvssl.codes imports lvssl.latents",
        "lvssl/losses/ntxent.py:1: lvssl.losses imports pipelines",
        "lvssl/models/net.py:1: lvssl.models imports lvssl.training",
        "lvssl/oddments.py: lvssl.oddments has no floor",
        "lvssl/report/page.py:1: lvssl.report imports lvssl.evaluation",
        "lvssl/training/pretrain.py:1: lvssl.training imports slurm",
        "pipelines/formats/tar.py:1: pipelines.formats imports pipelines.datasets",
        "pipelines/loader.py:2: pipelines imports lvssl.settings",
        "slurm/stages.py:1: slurm imports lvssl.commands",
        "tools/convert.py:1: tools imports benchmarks",
        "tools/convert.py:2: tools imports lvssl",
    ]


def test_allowed_imports_are_not(tmp_path):
    plant(
        tmp_path,
        {
            "lvssl/__init__.py": '__version__ = "0"\n',
            "lvssl/commands/main.py": "import slurm.stages\nfrom . import demo\nfrom ..runs import run\n",
            "lvssl/__main__.py": "from lvssl.commands.main import main\n",
            "lvssl/latents/__init__.py": "from .gaussian import Gaussian\nimport lvssl.latents.bernoulli\n",
            "lvssl/settings/pretrain.py": "from pipelines.views import View\n",
            "lvssl/training/pretrain.py": "from lvssl import __version__\nfrom ..losses import ntxent\n",
            "slurm/stages.py": "from lvssl.settings.pretrain import Settings\n",
            "benchmarks/loader.py": "import lvssl.commands.main, tools, slurm\n",
        },
    )
    assert violations(tmp_path) == []


def idle_modules(root: Path) -> list[str]:
    """Modules that no other source file imports, names, or runs: tests don't count."""
    sources = [file for package in OURS for file in sorted((root / package).rglob("*.py"))]
    texts = {file: file.read_text() for file in sources}
    configured = (root / "pyproject.toml").read_text() + (root / "Makefile").read_text()
    idle = []
    for file in sources:
        parts = file.relative_to(root).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__") or parts[0] in ("tools", "benchmarks"):
            continue
        name, (package, module) = ".".join(parts), (".".join(parts[:-1]), parts[-1])
        used = rf"\b{re.escape(name)}\b|from {re.escape(package)} import [^\n]*(\n[^)]*)?\b{module}\b"
        others = (text for other, text in texts.items() if other != file)
        if not any(module in text and re.search(used, text) for text in (*others, configured)):
            idle.append(name)
    return idle


def test_every_module_is_used():
    assert idle_modules(ROOT) == []


def test_a_module_that_only_a_test_imports_is_reported(tmp_path):
    (tmp_path / "Makefile").touch()
    (tmp_path / "pyproject.toml").write_text('lvssl = "lvssl.commands.main:main"')
    plant(
        tmp_path,
        {
            "lvssl/commands/main.py": "from lvssl.codes import (\n    pack,\n    search,\n)\n",
            "lvssl/codes/pack.py": "",
            "lvssl/codes/search.py": "",
            "lvssl/codes/idle.py": "from lvssl.codes import pack\n",
            "tests/test_idle.py": "from lvssl.codes import idle\n",
        },
    )
    assert idle_modules(tmp_path) == ["lvssl.codes.idle"]


PARAMETERS = 8
KERNELS_BY = ("compiled", "triton.jit", "njit")  # a kernel takes its arrays and numbers one by one


def long_parameter_lists(root: Path) -> list[str]:
    """Functions of more than PARAMETERS names, self aside, that are no kernels."""
    found = []
    for package in OURS[:-1]:
        for file in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if any(ast.unparse(each).partition("(")[0] in KERNELS_BY for each in node.decorator_list):
                    continue
                given = node.args
                names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
                count += (given.vararg is not None) + (given.kwarg is not None)
                if count > PARAMETERS:
                    found.append(f"{file.relative_to(root)}: {node.name} takes {count}")
    return found


def test_no_function_takes_more_than_eight_parameters():
    assert long_parameter_lists(ROOT) == []


def test_a_long_parameter_list_is_found_unless_it_is_a_kernels(tmp_path):
    nine = ", ".join("abcdefghi")
    text = f"def long({nine}): ...\n@compiled()\ndef kernel({nine}): ...\n"
    text += f"class A:\n    def fits(self, {nine[:-3]}): ...\n"
    text += f"    def no(self, {nine[:-6]}, *b, h=1, **c): ...\n"
    plant(tmp_path, {"pipelines/a.py": text})
    assert long_parameter_lists(tmp_path) == ["pipelines/a.py: long takes 9", "pipelines/a.py: no takes 10"]
