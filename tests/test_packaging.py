"""The lists that install Sitter agree with each other, and the vendored files are what they claim to be."""

import hashlib
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
VENDORED = [ROOT / "api/web/static" / name for name in ("docs", "vendor")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def lines(path: str) -> list[str]:
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture
def lock() -> dict[str, str]:
    pins = [pin.split("==") for pin in lines("constraints.txt")]
    return {canonicalize_name(name): version for name, version in pins}


def test_requirements_txt_is_the_core_list() -> None:
    constraint, *requirements = lines("api/requirements.txt")
    assert constraint == "-c ../constraints.txt"
    assert set(requirements) == set(PROJECT["dependencies"])
    assert len(requirements) == len(PROJECT["dependencies"])


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["training"]])
def test_the_lock_satisfies(requirement: str, lock: dict[str, str]) -> None:
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)])


def test_the_lock_works_on_other_machines() -> None:
    for pin in lines("constraints.txt"):
        # No local version (+cpu), no address, no path.
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin), pin


def test_the_lock_leaves_cuda_and_torchvision_out(lock: dict[str, str]) -> None:
    # pip resolves CUDA libraries where torch asks for them; PyPI's torchvision breaks a CPU torch.
    assert not [name for name in lock if name.startswith(("nvidia", "cuda", "triton", "torchvision"))]


def vendored() -> dict[Path, str]:
    """The files and checksums of the tables in each README.md."""
    return {
        folder / name: sha256
        for folder in VENDORED
        for name, sha256 in re.findall(
            r"^\| (\S+) \|.*\| ([0-9a-f]{64}) \|$", (folder / "README.md").read_text(), re.MULTILINE
        )
    }


def test_vendored_files_are_listed() -> None:
    present = {
        file for folder in VENDORED for file in folder.iterdir() if not re.search(r"LICENSE|NOTICE|README", file.name)
    }
    assert present == set(vendored())


@pytest.mark.parametrize(("file", "sha256"), vendored().items())
def test_vendored_files_are_verbatim(file: Path, sha256: str) -> None:
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize(
    "name", ["docs/swagger-ui.LICENSE", "docs/swagger-ui.NOTICE", "docs/redoc.LICENSE", "vendor/htmx.LICENSE"]
)
def test_vendored_files_carry_their_licence(name: str) -> None:
    assert (VENDORED[0].parent / name).stat().st_size > 0
