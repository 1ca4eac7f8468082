"""Where settings come from, and what is wrong with one, in words for people."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pydantic_settings
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from api.errors import SettingsError


class NamedSource(PydanticBaseSettingsSource):
    """A source of settings that people know by `name`, as in `.env`.

    Its models replace those of the sources below whole: a base of one with a LoRA of another is nobody. Pydantic
    merges dictionaries of several sources key by key, at every depth; what is no dict, it replaces.
    """

    def __init__(self, name: str, source: PydanticBaseSettingsSource) -> None:
        super().__init__(source.settings_cls)
        self.name = name
        self._source = source

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Returns what the source says of one field."""
        return self._source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        """Returns everything that is set here. Raises SettingsError when a variable is no JSON."""
        try:
            given = self._source()
        except pydantic_settings.SettingsError as error:
            raise SettingsError(f"USER_MODELS: this is not JSON: {error.__cause__} (from {self.name})") from error
        data = {self._known_or_as_spelled(str(name)): value for name, value in given.items()}
        models = data.get("user_models")
        if not isinstance(models, dict):
            return data
        whole = {user: MappingProxyType(model) if isinstance(model, dict) else model for user, model in models.items()}
        return {**data, "user_models": whole}

    def gives(self, place: Sequence[str]) -> bool:
        """Whether the setting at `place` comes from here: `("port",)`, or `("user_models", "ada", …)`."""
        value: Any = self()
        for name in place[:2]:
            if not isinstance(value, Mapping) or name not in value:
                return False
            value = value[name]
        return True

    def _known_or_as_spelled(self, name: str) -> str:
        return name.lower() if name.lower() in self.settings_cls.model_fields else name


def explain(
    error: ValidationError, sources: Sequence[NamedSource], settings: Collection[str], of_a_model: Collection[str]
) -> str:
    """Returns the first thing that is wrong, and where it was read.

    Args:
        error: what pydantic found.
        sources: where it looked, the weightiest first.
        settings: the names that there are.
        of_a_model: the names that an entry of USER_MODELS may have.
    """
    first = error.errors(include_input=False, include_url=False)[0]
    place = [str(part) for part in first["loc"] if part != "[key]"] or ["settings"]
    origin = next((source.name for source in sources if source.gives(place)), "")
    name = ".".join([place[0].upper(), *place[1:]])
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        return f"{name}: {message}" + (f" (from {origin})" if origin else "")
    if len(place) > 1:
        return unknown(name, origin, of_a_model)
    # Pydantic writes the names of `.env` small.
    return unknown(name if origin == ".env" else place[0], origin, [setting.upper() for setting in settings])


def unknown(name: str, origin: str, known: Collection[str]) -> str:
    """Returns that nobody knows the setting `name`, and which of `known` may have been meant."""
    spelled = {one.lower(): one for one in known}
    written = name.rpartition(".")[2].lower().removeprefix("sitter_")
    close = difflib.get_close_matches(written, spelled, n=1)
    where = f" in {origin}" if origin else ""
    return f"unknown setting {name}{where}" + "".join(f"; did you mean {spelled[one]}?" for one in close)
