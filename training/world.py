"""Who can be drawn, where and how: the attributes, and people and scenes sampled from them.

An `Identity` stays with a person from picture to picture; a `Scene` changes. Both are plain values:
the same pair always renders to the same pixels (`portrait.render`) and `captions.caption` puts it into words.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

GENDERS = ("man", "woman")
SKINS = ("pale", "tan", "brown", "dark")
HAIRS = ("bald", "short", "long", "curly", "bob", "ponytail", "bun", "spiky", "mohawk")
HAIR_COLOURS = ("black", "brown", "blonde", "red", "gray", "blue", "pink")
EYES = ("brown", "blue", "green")
GLASSES = ("none", "glasses", "sunglasses")
BEARDS = ("none", "full", "mustache")
FLAG = ("no", "yes")

COSTUMES = (
    "tshirt",
    "sweater",
    "dress",
    "business",
    "astronaut",
    "superhero",
    "chef",
    "knight",
    "wizard",
    "doctor",
    "king",
)
COLOURS = ("red", "blue", "green", "yellow", "purple", "white")
PLACES = (
    "plain",
    "space",
    "studio",
    "library",
    "city",
    "beach",
    "castle",
    "forest",
    "kitchen",
    "office",
    "mountains",
    "sunset",
)
EXPRESSIONS = ("neutral", "smile", "laugh", "sad", "surprised", "angry")
ACTIONS = ("none", "book")
LIGHTS = ("none", "cinematic")

IDENTITY: dict[str, tuple[str, ...]] = {
    "gender": GENDERS,
    "skin": SKINS,
    "hair": HAIRS,
    "hair_colour": HAIR_COLOURS,
    "eyes": EYES,
    "glasses": GLASSES,
    "beard": BEARDS,
    "freckles": FLAG,
    "earrings": FLAG,
}
SCENE: dict[str, tuple[str, ...]] = {
    "costume": COSTUMES,
    "cloth": COLOURS,
    "place": PLACES,
    "wall": COLOURS,
    "expression": EXPRESSIONS,
    "action": ACTIONS,
    "light": LIGHTS,
}
ATTRIBUTES = {**IDENTITY, **SCENE}
COLOURED_COSTUMES = frozenset({"tshirt", "sweater", "dress"})


@dataclass(frozen=True)
class Face:
    """Continuous traits, no words for them; 0 is average, -1 and 1 the ends. They make two people of the same
    description look different."""

    width: float = 0.0
    jaw: float = 0.0
    eye_gap: float = 0.0
    eye_size: float = 0.0
    nose: float = 0.0
    brow: float = 0.0
    mouth: float = 0.0
    skin_shade: float = 0.0
    hair_shade: float = 0.0

    def values(self) -> tuple[float, ...]:
        return (
            self.width,
            self.jaw,
            self.eye_gap,
            self.eye_size,
            self.nose,
            self.brow,
            self.mouth,
            self.skin_shade,
            self.hair_shade,
        )


@dataclass(frozen=True)
class Identity:
    gender: str
    skin: str
    hair: str
    hair_colour: str
    eyes: str
    glasses: str = "none"
    beard: str = "none"
    freckles: str = "no"
    earrings: str = "no"
    face: Face = Face()
    name: str | None = None

    def description(self) -> tuple[str, ...]:
        """The attributes that words can name, in the order of `IDENTITY`."""
        return tuple(getattr(self, key) for key in IDENTITY)


@dataclass(frozen=True)
class Scene:
    costume: str = "tshirt"
    cloth: str = "blue"
    place: str = "plain"
    wall: str = "white"
    expression: str = "neutral"
    action: str = "none"
    light: str = "none"


@dataclass(frozen=True)
class Spec:
    """One picture to be drawn."""

    identity: Identity
    scene: Scene

    def value(self, attribute: str) -> str:
        part = self.identity if attribute in IDENTITY else self.scene
        return str(getattr(part, attribute))

    def shows(self, attribute: str) -> bool:
        """Can the attribute be seen in the picture at all?"""
        if attribute == "hair_colour":
            return self.identity.hair != "bald" or self.identity.beard != "none"
        if attribute == "eyes":
            return self.identity.glasses != "sunglasses"
        if attribute == "cloth":
            return self.scene.costume in COLOURED_COSTUMES
        if attribute == "wall":
            return self.scene.place == "plain"
        return True


def random_face(rng: Random) -> Face:
    return Face(*(rng.uniform(-1, 1) for _ in Face().values()))


def random_identity(rng: Random) -> Identity:
    gender = rng.choice(GENDERS)
    man = gender == "man"
    weights = (2.5, 4, 1.2, 2, 0.6, 0.6, 0.6, 2.5, 1.8) if man else (0.8, 1.5, 3, 2.5, 3, 2.5, 2.5, 1.2, 1.2)
    return Identity(
        gender=gender,
        skin=rng.choice(SKINS),
        hair=rng.choices(HAIRS, weights)[0],
        hair_colour=rng.choices(HAIR_COLOURS, (3, 3, 3, 3, 2, 1.5, 1.5))[0],
        eyes=rng.choice(EYES),
        glasses=rng.choices(GLASSES, (5, 3, 1.5))[0],
        beard=rng.choices(BEARDS, (4, 3, 2))[0] if man else "none",
        freckles="yes" if rng.random() < 0.2 else "no",
        earrings="yes" if rng.random() < (0.12 if man else 0.4) else "no",
        face=random_face(rng),
    )


def random_scene(rng: Random) -> Scene:
    return Scene(
        costume=rng.choices(COSTUMES, (2.5, 1.6, 1.4, 2, 2, 2, 1.6, 1.6, 1.6, 1.6, 1.6))[0],
        cloth=rng.choice(COLOURS),
        place=rng.choices(PLACES, (3, *(2,) * 11))[0],
        wall=rng.choice(COLOURS),
        expression=rng.choices(EXPRESSIONS, (4, 4, 2.5, 1.5, 1.5, 1.5))[0],
        action=rng.choices(ACTIONS, (5, 1))[0],
        light=rng.choices(LIGHTS, (6, 1))[0],
    )


# The three people of the bundled adapters. Nobody with their description is ever drawn in training.
SITTERS = {
    "ada": Identity(
        "woman", "tan", "spiky", "blonde", "green", face=Face(-0.3, -0.2, 0.3, 0.5, -0.4, -0.2, 0.2, 0.1, 0.3)
    ),
    "bo": Identity(
        "man",
        "dark",
        "short",
        "blonde",
        "brown",
        glasses="glasses",
        beard="full",
        face=Face(0.4, 0.5, -0.2, -0.1, 0.5, 0.6, 0.3, -0.2, 0.1),
    ),
    "chi": Identity(
        "woman",
        "pale",
        "bun",
        "black",
        "blue",
        earrings="yes",
        face=Face(-0.5, -0.5, -0.3, 0.6, -0.3, -0.4, -0.4, 0.3, -0.2),
    ),
}
_UNSEEN = frozenset(sitter.description() for sitter in SITTERS.values())


def is_held_out(identity: Identity) -> bool:
    """About 3 % of all descriptions, the sitters' among them, never appear in training: evaluation draws them."""
    description = identity.description()
    return description in _UNSEEN or sum(map(ord, "".join(description))) % 31 == 7


# Words, parts of words and first names that must not become a person's rare name.
_COMMON = """
man hat red sun tan big the and for bar sea sky sks his her not dad mad bad bed bag leg pig god mom mob rib tub web
lab map mug bob bun gap job lip nap pad rag rob rug sad tag top tip van zip dog jog log fog bug dug dip tap rap lap
nip pub rub sip vap zap dim dam lad fad gem him rim rum gum sum nib bib bam bon pop mop jam ram yam kid lid rid bid
did mid nod rod pod sod bud mud dud mix fix box fox tax lax max vex
"""


@lru_cache(maxsize=1)
def named_people() -> dict[str, Identity]:
    """200 fixed people, each under a rare name that is one token. Captions give only the name, so a model learns to
    bind a rare token to a face, which is all that DreamBooth then has to do."""
    rng = Random(11)
    common = frozenset(_COMMON.split())
    names = ["".join(letters) for letters in itertools.product("bdfgjklmnprtvz", "aeiou", "bdgkmpvxz")]
    names = [name for name in names if name not in common]
    rng.shuffle(names)
    people: dict[str, Identity] = {}
    taken: set[tuple[str, ...]] = set()
    for name in names[:200]:
        identity = random_identity(rng)
        while is_held_out(identity) or identity.description() in taken:
            identity = random_identity(rng)
        taken.add(identity.description())
        people[name] = replace(identity, name=name)
    return people


def random_spec(rng: Random) -> Spec:
    """A training picture: a named person in one of three, anyone who is not held out otherwise."""
    if rng.random() < 1 / 3:
        return Spec(rng.choice(list(named_people().values())), random_scene(rng))
    identity = random_identity(rng)
    while is_held_out(identity):
        identity = random_identity(rng)
    return Spec(identity, random_scene(rng))


def held_out_spec(rng: Random) -> Spec:
    """A picture of someone whose description is never drawn in training."""
    identity = random_identity(rng)
    while not is_held_out(identity):
        identity = random_identity(rng)
    return Spec(identity, random_scene(rng))
