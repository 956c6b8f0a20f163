"""The order of docs/design.md: a folder imports only from folders above it, without circles."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlmjax

PACKAGE = Path(__file__).parents[1] / "mlmjax"
WITHOUT_JAX = ("text", "config", "statistics", "data")
MOST_FILES, MOST_LINES = 8, 600


def read_order():
    """Return the top-level folders and files of docs/design.md in their order."""
    design = (PACKAGE.parent / "docs" / "design.md").read_text()
    return re.findall(r"^\| `(\w+)(?:\.py|/)` \|", design, flags=re.MULTILINE)


def modules():
    """Return {dotted name: path} of every file of the package but the `__init__`s."""
    paths = sorted(PACKAGE.rglob("*.py"))
    named = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}
    skipped = ("__init__", "__main__")
    return {name: path for name, path in named.items() if not name.endswith(skipped)}


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
ORDER = read_order()


def imported_names(name):
    """Yield each import of a module, those inside functions included: (module, imported name)."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def imported_modules(name):
    """Return the modules of the package that a module imports."""
    found = {name for pair in imported_names(name) for name in (pair[0], ".".join(map(str, pair)))}
    return {name.removeprefix("mlmjax.") for name in found} & MODULES.keys()


IMPORTS = {name: imported_modules(name) for name in MODULES}


def defined_names(tree):
    """Return the names that a module defines itself, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


DEFINED = {name: defined_names(tree) for name, tree in TREES.items()}


def test_the_document_lists_every_folder_and_file_at_the_top():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    entries -= {"__init__", "__main__", "_version", "assets", "__pycache__"}
    assert set(ORDER) == entries
    assert len(ORDER) <= 17


@pytest.mark.parametrize("name", list(MODULES))
def test_imports_run_one_way_and_from_where_names_are_defined(name):
    folder = name.split(".")[0]
    for target in IMPORTS[name]:
        other = target.split(".")[0]
        if other != "_version":
            assert ORDER.index(other) <= ORDER.index(folder), f"{name} imports {target}"
    for module, imported in imported_names(name):
        if imported and (home := module.removeprefix("mlmjax.")) in DEFINED:
            assert imported in DEFINED[home], f"{name} from {module}"
        if folder in {*WITHOUT_JAX, "errors", "storage"}:
            assert module.split(".")[0] not in {"jax", "flax", "optax"}, name


def test_neither_files_nor_folders_form_a_circle():
    folders = {}
    for name, targets in IMPORTS.items():
        folder = name.rpartition(".")[0]
        others = {target.rpartition(".")[0] for target in targets} - {folder}
        folders.setdefault(folder, set()).update(others)
    for graph in (IMPORTS, folders):
        TopologicalSorter(graph).prepare()  # raises CycleError


def test_lower_rooms_load_without_jax():
    lower = ", ".join(f"mlmjax.{name}" for name in MODULES if name.split(".")[0] in WITHOUT_JAX)
    code = f"import sys; import {lower}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_folders_and_files_are_small_and_folders_say_what_they_are_for():
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert max(lines.values()) <= MOST_LINES, lines
    for folder in {path.parent for path in MODULES.values()} - {PACKAGE}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, folder
        tree = ast.parse((folder / "__init__.py").read_text())
        assert len(ast.get_docstring(tree) or "") > 60, folder
        assert len(tree.body) == 1 or folder == PACKAGE / "data", folder


def test_type_checkers_see_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = {name: f"mlmjax.{home}.{name}" for name, home in mlmjax._MODULES.items()}
    assert seen == table | {"data": "mlmjax.data"}
    assert set(dir(mlmjax)) == {*table, "data", "InputError", "RunError", "__version__"}
