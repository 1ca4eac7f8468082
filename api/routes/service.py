"""What every route needs: the opened service."""

from typing import Annotated

from fastapi import Depends, Request

from api.wiring import Service


async def get_service(request: Request) -> Service:
    """Returns the service that the lifespan opened. On the event loop: FastAPI would send a plain `def` to a thread."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
