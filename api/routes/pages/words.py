"""The words of the pages in the visitor's language: Babel catalogues, read once and never compiled to files."""

import io
from functools import cache
from gettext import GNUTranslations, NullTranslations
from pathlib import Path

LOCALES = Path(__file__).resolve().parents[2] / "web" / "locale"
LANGUAGES = {"en": "English", "fr": "Français", "pt": "Português"}


@cache
def translations(language: str) -> NullTranslations:
    """Returns the catalogue of a language; the pages' own words are English."""
    catalogue = LOCALES / f"{language}.po"
    if not catalogue.exists():
        return NullTranslations()
    from babel.messages.mofile import write_mo
    from babel.messages.pofile import read_po

    compiled = io.BytesIO()
    with catalogue.open("rb") as file:
        write_mo(compiled, read_po(file, locale=language))
    compiled.seek(0)
    return GNUTranslations(compiled)


def preferred(accept_language: str | None) -> str:
    """Returns the language of ours that an Accept-Language header (RFC 9110, 12.5.4) likes best, else English."""
    best, most = "en", 0.0
    for one in (accept_language or "").split(",")[:20]:
        tag, _, rest = one.strip().partition(";")
        language = tag.strip().lower().partition("-")[0]
        try:
            weight = float(rest.strip().removeprefix("q=")) if rest else 1.0
        except ValueError:
            continue
        if language in LANGUAGES and weight > most:
            best, most = language, weight
    return best
