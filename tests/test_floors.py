"""The floors of the house: imports in api/ only point down (ARCHITECTURE.md says why)."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

API = Path(__file__).parent.parent / "api"

# The top floor first. `|` parts the rooms of one floor, which do not see each other;
# files named together are one room. A folder is one room.
FLOORS = """
main
routes | cli cli_delta cli_models cli_people cli_train cli_users cli_vault serving
wiring
domain
providers
model_service
store | engine
config errors model_source origins schemas whole wire
__init__ | test_api
"""

# What a room may not import although it lies lower: (room, lower room, the one module allowed).
CLOSED = [
    ("providers", "store", None),
    ("domain", "providers", "providers.base"),
    ("routes", "providers", None),
    ("routes", "store", None),
]

# Heavy libraries, and the one place that may import them.
HEAVY = {
    "torch": "engine",
    "diffusers": "engine",
    "transformers": "engine",
    "peft": "engine",
    "accelerate": "engine",
    "safetensors": "engine",
    "ray": "providers.ray",
}

MAX_LINES = 400

# file or folder name -> (floor, room)
PLACE = {
    name: (floor, room.strip())
    for floor, line in enumerate(reversed(FLOORS.split("\n")))
    for room in line.split("|")
    for name in room.split()
}


def violations(api: Path) -> list[str]:
    """Every breach of the rules under `api`, as `file:line: what is wrong`."""
    modules = {_module(file, api): file for file in sorted(api.rglob("*.py"))}
    found = []
    for module, file in modules.items():
        where = file.relative_to(api.parent)
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source, str(file))
        if (lines := len(source.splitlines())) > MAX_LINES:
            found.append(f"{where}:{lines}: more than {MAX_LINES} lines; split the file")
        found += [f"{where}:{line}: `except: pass` swallows an error" for line in _swallowed(tree)]
        if _room(module) not in PLACE:
            found.append(f"{where}:1: no floor for this room; give it one in FLOORS and in ARCHITECTURE.md")
            continue
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for line, target in _imports(tree, package, set(modules)):
            found += [f"{where}:{line}: {wrong}" for wrong in _wrong(module, target)]
    return found


def _module(file: Path, api: Path) -> str:
    """`api/routes/health.py` -> `api.routes.health`, `api/engine/__init__.py` -> `api.engine`."""
    parts = file.relative_to(api.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """`api.routes.health` -> `routes`, `api` -> `__init__`."""
    return f"{module}.__init__".split(".", maxsplit=2)[1]


def _imports(tree: ast.AST, package: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import wherever it stands; relative ones count from `package`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(names=names):
                source = resolve_name("." * node.level + (node.module or ""), package)
                for alias in names:
                    name = f"{source}.{alias.name}"
                    # `from api import config` names a module, `from api.config import Settings` does not.
                    is_module = name in modules or (source == "api" and alias.name in PLACE)
                    yield node.lineno, name if is_module else source
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def _wrong(module: str, target: str) -> Iterator[str]:
    """What is wrong with `module` importing `target`."""
    top = target.split(".", maxsplit=1)[0]
    if top in HEAVY and not _within(module, HEAVY[top]):
        yield f"`{top}` is imported only in {HEAVY[top]}"
    if top in PLACE:
        yield f"`{target}` would be a second copy of api.{target} under another name; import api.{target}"
    if top != "api":
        return
    if _room(target) not in PLACE:
        yield f"`{target}` has no floor in FLOORS"
        return
    (floor, room), (target_floor, target_room) = PLACE[_room(module)], PLACE[_room(target)]
    if target_floor >= floor and target_room != room:
        yield f"{room} may not import {target_room}: imports only point to lower floors"
    for upper, lower, allowed in CLOSED:
        if room == upper and target_room == lower and not (allowed and _within(target, allowed)):
            yield f"{upper} may not import {lower}" + (f" except {allowed}" if allowed else "")


def _within(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"api.{place}.")


def _swallowed(tree: ast.AST) -> Iterator[int]:
    """Lines of handlers that do nothing: `pass`, `...` or a bare string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and all(_is_idle(statement) for statement in node.body):
            yield node.lineno


def _is_idle(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass)


def test_api_keeps_the_floors() -> None:
    found = violations(API)
    assert not found, "\n".join(found)


GOOD = {
    "__init__.py": "",
    "config.py": "import os\nfrom .errors import SitterError",
    "errors.py": "class SitterError(Exception): ...",
    "engine/__init__.py": "",
    "engine/sampler.py": "import torch\nfrom safetensors import torch as st\nfrom api.config import Settings",
    "engine/batch.py": "from . import sampler\nfrom .sampler import step",
    "store/__init__.py": "",
    "store/files.py": "from ..errors import SitterError",
    "model_service.py": "def load():\n    from api.engine import batch",
    "providers/__init__.py": "",
    "providers/base.py": "from api import schemas",
    "providers/local.py": "from api.model_service import ModelService\nfrom .base import Provider",
    "providers/ray.py": "import ray",
    "domain/generate.py": "from api.providers.base import Provider\nfrom api.store import files",
    "wiring.py": "from api.providers.local import Local\nfrom api.store.files import Files",
    "routes/generate.py": "from api.domain.generate import run\nfrom api.schemas import GenerateRequest",
    "main.py": "from api import config, wiring\nfrom api.routes.generate import router",
    "cli.py": "from api.wiring import open_service",
}

PLANTED = [
    ("config.py", "from api.store import files", "may not import store"),
    ("config.py", "from . import main", "may not import main"),
    ("engine/batch.py", "from api.store.files import Files", "engine may not import store"),
    ("engine/batch.py", "from ..routes.generate import router", "engine may not import routes"),
    ("engine/__init__.py", "from ..domain import generate", "engine may not import domain"),
    ("model_service.py", "import api.providers.local", "model_service may not import providers"),
    ("model_service.py", "def f():\n    from api import wiring", "may not import wiring"),
    (
        "providers/local.py",
        "if typing.TYPE_CHECKING:\n    import api.store",
        "may not import store",
    ),
    ("domain/generate.py", "from api.providers import local", "except providers.base"),
    ("domain/generate.py", "from api.providers import Local", "except providers.base"),
    ("routes/generate.py", "from api.store.files import Files", "routes may not import store"),
    ("routes/generate.py", "from ..providers import base", "routes may not import providers"),
    ("routes/generate.py", "importlib.import_module('api.main')", "may not import main"),
    ("routes/generate.py", "from api import cli", "routes may not import cli"),
    ("cli.py", "from api.main import create_app", "may not import main"),
    ("main.py", "from wiring import open_service", "a second copy"),
    ("main.py", "def f():\n    import torch.cuda", "`torch` is imported only in engine"),
    ("wiring.py", "from safetensors import safe_open", "`safetensors` is imported only in engine"),
    ("providers/local.py", "import ray", "`ray` is imported only in providers.ray"),
    ("utils.py", "", "no floor for this room"),
    ("helpers/text.py", "", "no floor for this room"),
    ("main.py", "try:\n    f()\nexcept OSError:\n    pass", "swallows"),
    ("main.py", "try:\n    f()\nexcept OSError:\n    'never mind'\n    ...", "swallows"),
    ("main.py", "x = 1\n" * 401, "more than 400 lines"),
]


def build(api: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = api / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def test_a_good_house_passes(tmp_path: Path) -> None:
    build(tmp_path / "api", GOOD)
    assert violations(tmp_path / "api") == []


@pytest.mark.parametrize(("file", "source", "message"), PLANTED)
def test_a_planted_violation_is_caught(tmp_path: Path, file: str, source: str, message: str) -> None:
    build(tmp_path / "api", {**GOOD, file: source})
    found = violations(tmp_path / "api")
    assert len(found) == 1, found
    assert found[0].startswith(f"api/{file}:")
    assert message in found[0]
