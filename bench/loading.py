"""First use of each model, and the bytes that one more user costs."""

import time
from collections.abc import Iterator

from api.config import load_settings
from api.model_service import ModelService
from bench.figures import Figure


def figures() -> Iterator[Figure]:
    """Seconds to the first lease of each bundled model, in order, and the bytes each adds to those before."""
    settings = load_settings(log_level="error")
    service = ModelService(settings)
    try:
        assert service.engine.device  # torch's import is not a model's load
        for user, source in settings.user_models.items():
            before = service.cache.used()
            began = time.perf_counter()
            with service.lease(source):
                took = time.perf_counter() - began
            yield Figure(f"first use of {user}", took, "s")
            yield Figure(f"bytes that {user} adds", service.cache.used() - before, "bytes")
    finally:
        service.close()
