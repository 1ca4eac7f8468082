"""Photos of a training must show one face each, where FACE_DETECTOR says who counts them: the last of their checks.

It is the worker's, as a server need not have what computes. What is refused here is deleted at once.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter

from api.domain.generate import Studio
from api.domain.photos import require_enough
from api.store.tables import Request

# Class nouns of whoever has such a face; a dog's is none that is looked for.
PEOPLE = {"person", "human", "man", "woman", "boy", "girl", "child", "kid", "baby", "teenager", "lady", "guy"}
Verdict = dict[str, Any]  # on a picture, as the wire shows it


async def require_faces(
    studio: Studio,
    job: Request,
    know: Callable[[list[Verdict]], None],
    beat: Callable[[], Awaitable[None]],
    check: Callable[[], None],
    threads: CapacityLimiter,
) -> None:
    """Has the faces in a training's photos counted, and drops the photos that do not show exactly one.

    Args:
        studio: what counts, and where the photos are.
        job: the training; one of something else than people passes.
        know: is told the verdicts on all pictures anew.
        beat: writes that down at once.
        check: called now and then.
        threads: where it computes.

    Raises:
        InvalidRequest: fewer photos are good than a training takes.
        SitterError: the detector does not load; or whatever `check` raised.
    """
    if not studio.models.counts_faces or job.parameters["class_noun"] not in PEOPLE:
        return
    verdicts = await anyio.to_thread.run_sync(_looked_at, studio, job, check, limiter=threads)
    know(verdicts)
    await beat()
    bad = [_file_of(place) for place, verdict in enumerate(verdicts) if not verdict["good"]]
    await anyio.to_thread.run_sync(studio.folder.drop_photos, job.id, bad)
    require_enough(len(verdicts) - len(bad), [(verdict["name"], verdict["reason"]) for verdict in verdicts])


def _looked_at(studio: Studio, job: Request, check: Callable[[], None]) -> list[Verdict]:
    """Returns the verdicts on all pictures of a training anew."""
    photos = dict(studio.folder.named_photos_of(job.id))
    counts = studio.models.count_faces(list(photos.values()), check)
    assert job.training is not None
    faces = dict(zip(photos, counts, strict=True))
    return [_verdict(known, faces.get(_file_of(place), 1)) for place, known in enumerate(job.training["pictures"])]


def _verdict(known: Verdict, faces: int) -> Verdict:
    if faces == 1 or not known["good"]:
        return known
    return known | {"good": False, "reason": f"it shows {faces} people, not one alone" if faces else "it shows no face"}


def _file_of(place: int) -> str:
    """Returns the name under which `photos.choose` keeps the picture at a place among all that came."""
    return f"{place:02}.png"
