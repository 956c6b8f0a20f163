"""The layering of docs/design.md: a module imports only from lower rows, or from its left."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlmjax"


def table():
    """Return (layer, modules) of each row of the table in docs/design.md, lowest layer first."""
    design = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (\d) \| (`.*?`) \|", design, flags=re.MULTILINE)
    return [(int(layer), re.findall(r"`(.*?)`", modules)) for layer, modules in rows]


LAYER = {name: layer for layer, names in table() for name in names}
PLACE = {name: (row, at) for row, (_, names) in enumerate(table()) for at, name in enumerate(names)}
FACADE = "__init__"  # the public names, loaded lazily: it may name every module


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        if name != FACADE:
            yield name, path


def imports(path):
    """Yield (line, module) for every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("mlmjax.") in PLACE and node.module == "mlmjax"
                yield node.lineno, inner if is_module else node.module


def test_every_module_has_a_place():
    assert {name for name, _ in modules()} == set(PLACE)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value)[-30:])
def test_imports_point_down_or_left(name, path):
    for line, imported in imports(path):
        if imported == "mlmjax" or not imported.startswith("mlmjax."):
            continue
        target = imported.removeprefix("mlmjax.")
        assert PLACE[target] < PLACE[name], (
            f"{path.name}:{line}: {name} imports {target}, which is not below it or to its left"
        )


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value)[-30:])
def test_lower_layers_do_not_name_jax(name, path):
    if LAYER[name] > 1:
        return
    found = [line for line, module in imports(path) if module.split(".")[0] in {"jax", "flax"}]
    assert not found, f"{path.name}: imports jax in lines {found}"


def test_lower_layers_load_without_jax():
    lower = ", ".join(f"mlmjax.{name}" for name, layer in LAYER.items() if layer <= 1)
    code = f"import sys, {lower}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_are_read_in_one_sitting():
    long = {name: n for name, path in modules() if (n := len(path.read_text().splitlines())) > 400}
    assert not long
