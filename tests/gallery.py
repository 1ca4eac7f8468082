"""A library with pictures in it, and an app of its routes."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from fastapi import APIRouter, FastAPI

from api.domain.accounts import ALL_SCOPES, Accounts, Caller
from api.domain.library import searchable
from api.domain.registry import Registry
from api.domain.wake import Wake
from api.model_service import ModelService
from api.routes.errors import add_error_handlers
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.models import ModelFolder
from api.store.tables import Image, ImageTag, new_id
from tests import people, rows

PROMPT = "photo of sks person"


class Gallery:
    """Pictures of a database and a folder.

    Args:
        database: where their rows are.
        folder: where their files are.
        fields: settings.
    """

    def __init__(self, database: Database, folder: Path, **fields: Any) -> None:
        self.accounts: Accounts = people.accounts_over(database, **fields)
        self.database = database
        self.vault = self.accounts.vault
        self.pictures = PictureFolder(folder)
        self.folder = folder

    def app(self, *rooms: APIRouter, **more: Any) -> FastAPI:
        app = FastAPI()
        add_error_handlers(app)
        service: dict[str, Any] = {
            "accounts": self.accounts,
            "settings": self.accounts.settings,
            "database": self.database,
            "vault": self.vault,
            "pictures": self.pictures,
            "wake": Wake(),
        }
        folder = ModelFolder(self.folder.parent / "data")
        registry = Registry(
            self.accounts.settings, self.database, folder, more.get("models", Mock(ModelService)), service["wake"]
        )
        app.state.service = SimpleNamespace(**service, **more, folder=folder, registry=registry)
        for room in rooms:
            app.include_router(room)
        return app

    async def hang(
        self,
        user_id: str,
        prompt: str = PROMPT,
        negative_prompt: str | None = None,
        sensitive: bool = False,
        tags: tuple[str, ...] = (),
        png: bytes = b"png",
        request: dict[str, Any] | None = None,
        **image: Any,
    ) -> Image:
        """Adds a finished picture of a user who is there."""
        seal = self.vault.seal if sensitive else str
        request_id = new_id()
        name = f"{user_id}_20250107_143022_{request_id[-8:]}.png"
        job = rows.request(
            user_id,
            id=request_id,
            description=seal(prompt),
            negative_prompt=negative_prompt and seal(negative_prompt),
            sensitive=sensitive,
            parameters={"num_inference_steps": 30, "guidance_scale": 7.5, "scheduler": None, "seed": 42},
            status="succeeded",
            tags=list(tags),
            **(request or {}),
        )
        row = rows.image(
            job,
            image_url=name,
            words="" if sensitive else searchable(prompt),
            bytes=len(png),
            sha256=hashlib.sha256(png).hexdigest(),
            **image,
        )
        self.pictures.save(name, png)
        await self.write([job], [row], [ImageTag(image_id=row.id, tag=tag) for tag in tags])
        return row

    async def write(self, *groups: list[Any]) -> None:
        """Writes rows, each group after the one that it refers to."""
        async with self.database.transaction() as session:
            for group in groups:
                session.add_all(group)
                await session.flush()

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


def caller(user_id: str | None, is_admin: bool = False) -> Caller:
    return Caller(user_id, is_admin or user_id is None, ALL_SCOPES, "key" if user_id else "open")
