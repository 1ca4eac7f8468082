"""How the server is, on the wire."""

from typing import Literal

from pydantic import BaseModel, Field


class Alive(BaseModel):
    """The server answers."""

    status: Literal["live"] = Field(description="Always `live`.", examples=["live"])


class Ready(BaseModel):
    """The server takes requests."""

    status: Literal["ready"] = Field(description="Always `ready`.", examples=["ready"])
