"""What every route needs: the opened service."""

from typing import Annotated

from fastapi import Depends, Request

from api.wiring import Service


def get_service(request: Request) -> Service:
    """Returns the service that the lifespan opened."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
