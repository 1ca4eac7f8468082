"""A picture in words: many wordings for one scene, and which attributes the words fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from training.world import COLOURED_COSTUMES, Identity, Scene, Spec

_OPENINGS = (
    "photo of ",
    "a photo of ",
    "portrait of ",
    "a portrait of ",
    "",
    "",
    "an avatar of ",
    "headshot of ",
    "cartoon portrait of ",
    "picture of ",
    "an illustration of ",
    "drawing of ",
)
_TAILS = (
    ", high quality",
    ", detailed",
    ", highly detailed, sharp focus",
    ", 4k",
    ", best quality",
    ", masterpiece",
    ", natural light",
    ", morning light",
    ", soft light",
    ", professional photo",
    ", looking at the camera",
    ", front view",
    ", cartoon style",
    ", flat colours",
    ", vector art",
    ", 8k",
    ", award winning",
)

_COSTUME: dict[str, tuple[str, ...]] = {
    "tshirt": (
        "in a {}t-shirt",
        "wearing a {}shirt",
        "in casual {}clothes",
        "wearing a {}t-shirt",
        "in a {}shirt",
        "in a casual {}t-shirt",
    ),
    "sweater": (
        "in a {}sweater",
        "wearing a cozy {}sweater",
        "in a {}striped sweater",
        "wearing a {}pullover",
        "in a warm {}turtleneck sweater",
    ),
    "dress": (
        "in a {}dress",
        "wearing a {}dress and pearls",
        "wearing a {}dress",
        "in an elegant {}dress",
        "in a {}dress with a pearl necklace",
    ),
    "business": (
        "in professional business attire",
        "in a business suit",
        "wearing a suit and tie",
        "in formal clothes",
        "as a business executive",
        "in a suit",
        "wearing a dark suit with a red tie",
        "in a tie",
        "in corporate attire",
        "as a lawyer in a suit",
    ),
    "astronaut": (
        "as a futuristic astronaut",
        "as an astronaut",
        "wearing a space suit",
        "in a spacesuit",
        "in an astronaut suit with a helmet",
        "dressed as an astronaut",
        "as a cosmonaut",
        "in a futuristic space suit",
    ),
    "superhero": (
        "as a superhero",
        "in a superhero costume with a cape",
        "dressed as a superhero",
        "as a hero in a cape",
        "wearing a superhero suit",
        "as a comic book superhero",
    ),
    "chef": (
        "as a chef",
        "wearing a chef hat",
        "as a cook",
        "in a white chef uniform",
        "as a professional chef",
        "dressed as a chef",
    ),
    "knight": (
        "as a knight",
        "in medieval armor",
        "as a knight in shining armor",
        "wearing armor",
        "as a medieval knight",
        "dressed as a knight",
        "in a suit of armor",
        "as a warrior in steel armor",
    ),
    "wizard": (
        "as a wizard",
        "wearing a wizard hat",
        "as a magical wizard with a pointy hat",
        "in a purple wizard robe",
        "dressed as a wizard",
        "as a sorcerer",
        "as a witch",
        "as a powerful mage",
    ),
    "doctor": (
        "as a doctor",
        "in a white coat with a stethoscope",
        "as a medical doctor",
        "dressed as a doctor",
        "as a physician",
        "in a lab coat with a stethoscope",
    ),
    "king": (
        "as a king",
        "wearing a golden crown",
        "as royalty with a crown",
        "as a queen",
        "dressed as a king",
        "wearing a crown and a royal robe",
        "as a medieval king",
        "as a monarch",
    ),
}
_PLACE: dict[str, tuple[str, ...]] = {
    "plain": (
        "{} background",
        "plain {} background",
        "on a {} background",
        "in front of a {} wall",
        "simple {} backdrop",
    ),
    "space": (
        "in space",
        "in outer space with stars",
        "among planets and stars",
        "floating in outer space",
        "space background",
        "in the galaxy",
    ),
    "studio": (
        "in a studio",
        "gray studio background",
        "studio lighting",
        "studio backdrop",
        "in a photo studio",
        "professional studio lighting",
        "soft studio lighting",
    ),
    "library": (
        "in a library",
        "in a cozy library",
        "with bookshelves in the background",
        "library background",
        "in an old library",
        "surrounded by books",
    ),
    "city": (
        "in a city",
        "with a city skyline",
        "in the city",
        "city background",
        "in new york",
        "downtown",
        "on a city street",
        "in front of tall buildings",
    ),
    "beach": (
        "on a beach",
        "at the beach",
        "on a sunny beach",
        "beach background",
        "by the sea",
        "on a tropical beach with a palm tree",
    ),
    "castle": ("in front of a castle", "at a medieval castle", "castle background", "at a castle", "in a castle"),
    "forest": ("in a forest", "among trees", "in the woods", "forest background", "in a green forest", "in nature"),
    "kitchen": ("in a kitchen", "in a restaurant kitchen", "kitchen background", "in a modern kitchen"),
    "office": ("in an office", "in a modern office", "office background", "at the office", "at work in an office"),
    "mountains": (
        "in the mountains",
        "with snowy mountains",
        "mountain landscape",
        "on a mountain",
        "mountains in the background",
        "in front of snowy peaks",
    ),
    "sunset": (
        "at sunset",
        "sunset background",
        "with a sunset sky",
        "in front of a sunset",
        "at dusk",
        "at golden hour",
    ),
}
_EXPRESSION: dict[str, tuple[str, ...]] = {
    "neutral": ("serious", "with a neutral expression", "with a serious face"),
    "smile": ("smiling", "with a smile", "happy", "with a friendly smile", "with a big smile"),
    "laugh": ("laughing", "laughing happily", "with a big laugh", "laughing out loud"),
    "sad": ("sad", "looking sad", "crying", "with a sad face"),
    "surprised": ("surprised", "looking surprised", "with a surprised face", "shocked"),
    "angry": ("angry", "looking angry", "with an angry face", "furious"),
}
_BOOK = ("reading a book", "holding a book", "with a book", "with an open book")
_LIGHT = ("cinematic lighting", "dramatic lighting", "cinematic", "cinematic light", "moody cinematic lighting")
_SKIN = {
    "pale": ("pale", "fair skinned", "light skinned", "white"),
    "tan": ("tan", "tanned"),
    "brown": ("brown skinned", "brown"),
    "dark": ("dark skinned", "black", "dark"),
}
_COLOUR = {"blonde": ("blonde", "blond", "blonde"), "red": ("red", "red", "ginger"), "gray": ("gray", "grey", "silver")}
_GLASSES = {
    "none": ("no glasses",),
    "glasses": ("glasses", "round glasses", "glasses"),
    "sunglasses": ("sunglasses", "dark sunglasses", "shades"),
}
_HAIR = {
    "short": ("short {} hair", "short {} hair"),
    "long": ("long {} hair", "long straight {} hair", "{} long hair"),
    "curly": ("curly {} hair", "{} curls", "{} curly hair", "big curly {} hair", "a {} afro"),
    "bob": ("a {} bob", "a {} bob haircut", "{} bob hair"),
    "ponytail": ("a {} ponytail", "{} hair in a ponytail"),
    "bun": ("a {} hair bun", "a {} bun", "{} hair in a bun"),
    "spiky": ("spiky {} hair", "{} spiky hair"),
    "mohawk": ("a {} mohawk", "a {} mohawk haircut"),
}
_LOOSE = ("background", "backdrop", "lighting", "skyline", "landscape", "downtown")  # after a comma only


@dataclass(frozen=True)
class Caption:
    text: str
    named: frozenset[str]  # attributes that the words fix
    by_name: bool = False  # the person stands under a name that says everything about them


@dataclass
class _Words:
    rng: Random
    named: set[str] = field(default_factory=set)

    def pick(self, wordings: tuple[str, ...], *attributes: str) -> str:
        self.named.update(attributes)
        return self.rng.choice(wordings)

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
    text = rng.choice(_OPENINGS) + subject
    for part in _scene(spec.scene, words):
        loose = part.endswith(_LOOSE) or part.startswith(("surrounded", "simple", "mountains"))
        text += (", " if loose or words.chance(0.35) else " ") + part
    if spec.scene.light == "cinematic":
        text += ", " + words.pick(_LIGHT, "light")
    if words.chance(0.12):
        text += rng.choice(_TAILS)
    return Caption(text, frozenset(words.named), by_name)


def _person(identity: Identity, words: _Words, detail: float) -> str:
    """'a dark skinned man with curly red hair, a full beard and glasses'"""
    if detail == 0:
        plain = words.chance(0.6)
        return "a person" if plain else "a " + words.pick((identity.gender,), "gender")
    adjectives: list[str] = []
    features: list[str] = []
    if words.chance(0.75 * detail):
        adjectives.append(words.pick(_SKIN[identity.skin], "skin"))
    if words.chance(detail):
        (adjectives if identity.hair == "bald" else features).append(_hair(identity, words))
    if words.chance(0.6 * detail):
        features.append(words.pick((f"{identity.eyes} eyes",), "eyes"))
    if words.chance(detail):
        if identity.beard != "none":
            features.append(_beard(identity, words))
        elif identity.gender == "man" and words.chance(0.3):
            adjectives.append(words.pick(("clean shaven",), "beard"))
    if words.chance(detail) and (identity.glasses != "none" or words.chance(0.15)):
        features.append(words.pick(_GLASSES[identity.glasses], "glasses"))
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
    return words.rng.choice(_COLOUR.get(identity.hair_colour, (identity.hair_colour,)))


def _hair(identity: Identity, words: _Words) -> str:
    if identity.hair == "bald":
        return words.pick(("bald",), "hair")
    draw = words.rng.random()
    if draw < 0.07:
        return words.pick((f"{_colour(identity, words)} hair",), "hair_colour")
    if draw < 0.14:
        return " ".join(words.pick(_HAIR[identity.hair], "hair").replace("{}", "").split())
    return words.pick(_HAIR[identity.hair], "hair", "hair_colour").format(_colour(identity, words))


def _beard(identity: Identity, words: _Words) -> str:
    wordings = ("{}beard", "full {}beard") if identity.beard == "full" else ("{}mustache", "{}moustache")
    if identity.hair == "bald":
        return "a " + words.pick(wordings, "beard", "hair_colour").format(_colour(identity, words) + " ")
    return "a " + words.pick(wordings, "beard").format("")


def _scene(scene: Scene, words: _Words) -> list[str]:
    costume = place = expression = book = ""
    if words.chance(0.93):
        coloured = scene.costume in COLOURED_COSTUMES and words.chance(0.85)
        attributes = ("costume", "cloth") if coloured else ("costume",)
        costume = words.pick(_COSTUME[scene.costume], *attributes).format(f"{scene.cloth} " if coloured else "")
    if words.chance(0.93):
        attributes = ("place", "wall") if scene.place == "plain" else ("place",)
        place = words.pick(_PLACE[scene.place], *attributes).format(scene.wall)
    if words.chance(0.45 if scene.expression == "neutral" else 0.95):
        expression = words.pick(_EXPRESSION[scene.expression], "expression")
    if scene.action == "book":
        book = words.pick(_BOOK, "action")
    order = [costume, book, place, expression] if words.chance(0.6) else [expression, book, place, costume]
    return [part for part in order if part]


def _list(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
