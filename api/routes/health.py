"""GET /health, /health/live and /health/ready."""

import anyio.to_thread
from fastapi import APIRouter

from api import __version__
from api.errors import NotReady
from api.routes.errors import error_responses
from api.routes.service import ServiceDep
from api.schemas import HealthResponse
from api.wire.health import Alive, Ready

router = APIRouter(tags=["Service"])


@router.get("/health", summary="Is it up?")
async def health(service: ServiceDep) -> HealthResponse:
    """Says that the server is up, and what it holds. Waits for the device only in its first seconds."""
    engine = await anyio.to_thread.run_sync(lambda: service.models.engine)
    return HealthResponse(
        status="healthy",
        device=engine.device,
        models_loaded=service.models.cache.count(),
        dtype=engine.dtype,
        version=__version__,
    )


@router.get("/health/live", summary="Does it answer?")
async def live() -> Alive:
    """Says that the server answers. A supervisor starts it anew when it does not; nothing else is looked at."""
    return Alive(status="live")


@router.get("/health/ready", summary="Should it be sent requests?", responses=error_responses(503))
async def ready(service: ServiceDep) -> Ready:
    """Says whether the server takes requests: 503 while it stops, and without its device, its database or a disk."""
    if reasons := await service.readiness.reasons():
        raise NotReady("; ".join(reasons))
    return Ready(status="ready")
