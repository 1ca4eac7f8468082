"""A picture in words: many wordings for one scene, and which attributes the words fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from training import wordings
from training.world import COLOURED_COSTUMES, Identity, Scene, Spec


@dataclass(frozen=True)
class Caption:
    text: str
    named: frozenset[str]  # attributes that the words fix
    by_name: bool = False  # the person stands under a name that says everything about them


@dataclass
class _Words:
    rng: Random
    named: set[str] = field(default_factory=set)

    def pick(self, choices: tuple[str, ...], *attributes: str) -> str:
        self.named.update(attributes)
        return self.rng.choice(choices)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def caption(spec: Spec, rng: Random, *, who: str | None = None, detail: float | None = None) -> Caption:
    """Describe the picture. `who` ("sks person") stands for the person's own attributes; `detail` is the share of those
    that are named otherwise (default: all in 65 % of captions, half in 15 %, none in 20 %)."""
    words = _Words(rng)
    name = spec.identity.name
    by_name = who is None and detail is None and name is not None and words.chance(0.85)
    if by_name:
        who = f"{name} {rng.choices(('person', spec.identity.gender), (0.8, 0.2))[0]}"
    if detail is None:
        detail = rng.choices((1.0, 0.5, 0.0), (0.65, 0.15, 0.2))[0]
    subject = who if who is not None else _person(spec.identity, words, detail)
    text = rng.choice(wordings.OPENINGS) + subject
    for part in _scene(spec.scene, words):
        loose = part.endswith(wordings.LOOSE) or part.startswith(("surrounded", "simple", "mountains"))
        text += (", " if loose or words.chance(0.35) else " ") + part
    if spec.scene.light == "cinematic":
        text += ", " + words.pick(wordings.LIGHT, "light")
    if words.chance(0.12):
        text += rng.choice(wordings.TAILS)
    return Caption(text, frozenset(words.named), by_name)


def _person(identity: Identity, words: _Words, detail: float) -> str:
    """'a dark skinned man with curly red hair, a full beard and glasses'"""
    if detail == 0:
        plain = words.chance(0.6)
        return "a person" if plain else "a " + words.pick((identity.gender,), "gender")
    adjectives: list[str] = []
    features: list[str] = []
    if words.chance(0.75 * detail):
        adjectives.append(words.pick(wordings.SKIN[identity.skin], "skin"))
    if words.chance(detail):
        (adjectives if identity.hair == "bald" else features).append(_hair(identity, words))
    if words.chance(0.8 * detail):
        features.append(words.pick((f"{identity.eyes} eyes",), "eyes"))
    if words.chance(detail):
        if identity.beard != "none":
            features.append(_beard(identity, words))
        elif identity.gender == "man" and words.chance(0.3):
            adjectives.append(words.pick(("clean shaven",), "beard"))
    if words.chance(detail) and (identity.glasses != "none" or words.chance(0.15)):
        features.append(words.pick(wordings.GLASSES[identity.glasses], "glasses"))
    if identity.freckles == "yes" and words.chance(detail):
        features.append(words.pick(("freckles",), "freckles"))
    if identity.earrings == "yes" and words.chance(detail):
        features.append(words.pick(("earrings", "gold earrings"), "earrings"))
    if words.chance(0.4):
        words.rng.shuffle(features)
    adjectives.append(words.pick((identity.gender,), "gender") if words.chance(0.8) else "person")
    noun = " ".join(adjectives)
    return ("an " if noun[0] in "aeiou" else "a ") + noun + (" with " + _list(features) if features else "")


def _colour(identity: Identity, words: _Words) -> str:
    return words.rng.choice(wordings.COLOUR.get(identity.hair_colour, (identity.hair_colour,)))


def _hair(identity: Identity, words: _Words) -> str:
    if identity.hair == "bald":
        return words.pick(("bald",), "hair")
    draw = words.rng.random()
    if draw < 0.07:
        return words.pick((f"{_colour(identity, words)} hair",), "hair_colour")
    if draw < 0.14:
        return " ".join(words.pick(wordings.HAIR[identity.hair], "hair").replace("{}", "").split())
    return words.pick(wordings.HAIR[identity.hair], "hair", "hair_colour").format(_colour(identity, words))


def _beard(identity: Identity, words: _Words) -> str:
    choices = ("{}beard", "full {}beard") if identity.beard == "full" else ("{}mustache", "{}moustache")
    if identity.hair == "bald":
        return "a " + words.pick(choices, "beard", "hair_colour").format(_colour(identity, words) + " ")
    return "a " + words.pick(choices, "beard").format("")


def _scene(scene: Scene, words: _Words) -> list[str]:
    costume = place = expression = book = ""
    if words.chance(0.93):
        coloured = scene.costume in COLOURED_COSTUMES and words.chance(0.85)
        attributes = ("costume", "cloth") if coloured else ("costume",)
        costume = words.pick(wordings.COSTUME[scene.costume], *attributes).format(f"{scene.cloth} " if coloured else "")
    if words.chance(0.93):
        attributes = ("place", "wall") if scene.place == "plain" else ("place",)
        place = words.pick(wordings.PLACE[scene.place], *attributes).format(scene.wall)
    if words.chance(0.45 if scene.expression == "neutral" else 0.95):
        expression = words.pick(wordings.EXPRESSION[scene.expression], "expression")
    if scene.action == "book":
        book = words.pick(wordings.BOOK, "action")
    order = [costume, book, place, expression] if words.chance(0.6) else [expression, book, place, costume]
    return [part for part in order if part]


def _list(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
