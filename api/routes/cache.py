"""GET and DELETE /cache: the models in memory."""

import anyio.to_thread
from fastapi import APIRouter, Depends

from api.model_service import ModelService
from api.routes.caller import require
from api.routes.service import ServiceDep
from api.schemas import CacheCleared, CachedModel, CacheResponse

router = APIRouter(prefix="/cache", tags=["Service"], dependencies=[Depends(require("admin"))])


@router.get("", summary="Show the models in memory")
async def show_cache(service: ServiceDep) -> CacheResponse:
    """Lists the models in memory, most recently used first."""
    return await anyio.to_thread.run_sync(_describe, service.models)


@router.delete("", summary="Free the models in memory")
async def clear_cache(service: ServiceDep) -> CacheCleared:
    """Frees the models that are idle now, and those in use once their last picture is done."""
    freed, deferred = await anyio.to_thread.run_sync(service.models.clear_cache)
    later = f"; {deferred / 1e6:.1f} MB follow once their pictures are done" if deferred else ""
    return CacheCleared(
        success=True, message=f"Freed {freed / 1e6:.1f} MB{later}", freed_bytes=freed, deferred_bytes=deferred
    )


def _describe(models: ModelService) -> CacheResponse:
    cache = models.cache
    cached = [
        CachedModel(
            model_id=str(info.key),
            bytes=info.total_bytes,
            own_bytes=info.own_bytes,
            in_use=info.users,
            hits=info.hits,
        )
        for info in cache.info()
    ]
    return CacheResponse(
        models=cached,
        used_bytes={device: cache.used(device) for device in cache.budgets},
        budget_bytes=cache.budgets,
        slot_bytes=models.engine.slot_bytes(),
    )
