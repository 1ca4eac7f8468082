"""Every word of the pages is there in every language."""

import re
from pathlib import Path

import pytest
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

from api.routes.pages.look import WEB, duration, size
from api.routes.pages.words import LANGUAGES, LOCALES, preferred, translations

TEMPLATES = WEB / "templates"
OTHERS = sorted(LANGUAGES.keys() - {"en"})


def words() -> set[str]:
    """Every message of the templates."""
    found = extract_from_dir(TEMPLATES, [("**.html", "jinja2")], {"**.html": {"trimmed": "true"}})
    return {message[2] for message in found if isinstance(message[2], str)}


@pytest.mark.parametrize("language", OTHERS)
def test_every_message_is_translated(language: str) -> None:
    with (LOCALES / f"{language}.po").open("rb") as file:
        known = {message.id: message.string for message in read_po(file) if message.id}
    asked = words()
    assert len(asked) > 50
    assert not sorted(asked - known.keys())
    assert not sorted(known.keys() - asked), "of no use any more"
    for message, said in known.items():
        assert said, message
        assert isinstance(message, str)
        assert isinstance(said, str)
        named = re.findall(r"%\(\w+\)s", message)
        assert sorted(re.findall(r"%\(\w+\)s", said)) == sorted(named), message


@pytest.mark.parametrize(
    ("header", "language"),
    [
        (None, "en"),
        ("", "en"),
        ("fr", "fr"),
        ("fr-CA,fr;q=0.9,en;q=0.8", "fr"),
        ("de,pt-BR;q=0.7,en;q=0.3", "pt"),
        ("en;q=0.5,fr;q=0.6", "fr"),
        ("xx;q=zz,pt", "pt"),
        ("*," * 5000, "en"),
    ],
)
def test_the_browser_says_what_it_likes(header: str | None, language: str) -> None:
    assert preferred(header) == language


def test_a_language_speaks() -> None:
    assert translations("fr").gettext("Cancel") == "Annuler"
    assert translations("en").gettext("Cancel") == "Cancel"


def test_times_and_sizes_are_said_as_people_say_them() -> None:
    assert [duration(each) for each in (0, 1.14, 14.2, 119, 180, 7200)] == [
        "0.1 s",
        "1.1 s",
        "14 s",
        "119 s",
        "3 min",
        "2 h",
    ]
    assert [size(each) for each in (12, 412_000, 1_300_000_000)] == ["12 B", "412 kB", "1.3 GB"]


def test_no_template_has_inline_style_or_script() -> None:
    for template in Path(TEMPLATES).glob("*.html"):
        html = template.read_text(encoding="utf-8")
        assert not re.search(r"<style|\sstyle=|<script(?![^>]*\ssrc=)|\son\w+=|javascript:", html), template.name
        assert not re.search(r"\|\s*safe|autoescape false", html), template.name
