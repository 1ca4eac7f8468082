"""GET /health."""

import anyio.to_thread
from fastapi import APIRouter

from api import __version__
from api.routes.service import ServiceDep
from api.schemas import HealthResponse

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
