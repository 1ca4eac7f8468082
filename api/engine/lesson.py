"""What a sitter's training is given. Free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from api.wire.models import Kind


@dataclass(frozen=True)
class Lesson:
    """What is to be learned: photos (PNG) of somebody who shall answer to `token` and the class noun.

    What comes of it is a LoRA, or of the kind `full` a whole model, all of whose weights learn. Steps and rank are the
    base's own choice where they are None; `flip` adds every photo's mirror image. Where
    `train_text_encoder` is said the words learn, too, and not the pictures alone. Without `prior_preservation` a batch
    has the sitter's pictures alone: faster, and the class may become the sitter. `resolution` is the side in pixels of
    the square that is learned of each photo, from 256 to the base's own, which None stands for.
    """

    photos: Sequence[bytes]
    noun: str
    token: str = "sks"
    kind: Kind = "lora"
    steps: int | None = None
    rank: int | None = None
    seed: int = 0
    flip: bool = False
    train_text_encoder: bool = False
    prior_preservation: bool = True
    resolution: int | None = None

    @property
    def who(self) -> str:
        """The words for the sitter."""
        return f"{self.token} {self.noun}"
