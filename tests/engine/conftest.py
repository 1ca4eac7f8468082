from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import families

FamilyFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> FamilyFolder:
    """Returns the folder of a tiny pipeline of some family; not to be changed."""
    home = tmp_path_factory.mktemp("families")
    return cache(lambda family: families.save(family, home / family))
