"""The README's settings table is that of the code. To renew it: `python tests/test_readme.py`."""

import re
from pathlib import Path

import pytest

from api.config import ROOT, Settings

README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def settings_table() -> str:
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or field.default_factory else field.default
        if isinstance(default, Path):
            default = default.relative_to(ROOT)
        lines.append(f"| `{name.upper()}` | {f'`{default}`' if default != '' else ''} | {field.description} |")
    return "\n".join(lines) + "\n"


def test_settings_table_is_current() -> None:
    match = BLOCK.search(README.read_text())
    assert match
    assert match.group() == settings_table()


@pytest.mark.parametrize("page", [README, ROOT / "ARCHITECTURE.md", ROOT / "api" / "README.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda _: settings_table(), README.read_text()))
