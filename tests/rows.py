"""Rows of the database, with what a test does not care about filled in."""

from typing import Any

from api.store.tables import Image, Request, User, new_id


def user(user_id: str, **fields: Any) -> User:
    return User(**{"id": user_id, "name": user_id.title(), **fields})


def request(user_id: str, **fields: Any) -> Request:
    defaults = {
        "id": new_id(),
        "description": "photo of sks person",
        "parameters": {},
        "model_id": "models/demo",
        "body_hash": "0" * 64,
        "images": 1,
        "steps": 30,
        "work": 1,
        "start_tag": 0,
    }
    return Request(**{**defaults, "user_id": user_id, **fields})


def image(request: Request, **fields: Any) -> Image:
    image_id = new_id()
    defaults = {
        "id": image_id,
        "position": 0,
        "image_url": f"{image_id}.png",
        "description": request.description,
        "sensitive": bool(request.sensitive),
        "words": "" if request.sensitive else request.description.lower(),
        "width": 512,
        "height": 512,
        "seed": 42,
        "bytes": 4,
        "sha256": "0" * 64,
        "processing_time": 1.5,
    }
    own = {"request_id": request.id, "user_id": request.user_id, "model_id": request.model_id}
    return Image(**{**defaults, **own, **fields})
