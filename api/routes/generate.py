"""POST /generate and /generate/image."""

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Body, Response

from api.domain.generate import generate
from api.errors import InvalidRequest
from api.routes.errors import error_responses
from api.routes.service import ServiceDep, WaitingDep
from api.schemas import GenerateRequest, GenerateResponse

router = APIRouter(tags=["Pictures"])

EXAMPLES: dict[str, Any] = {
    "ada": {
        "summary": "Ada as an astronaut, from her own model",
        "value": {"prompt": "photo of sks person as a futuristic astronaut", "user_id": "ada", "seed": 42},
    },
    "anybody": {
        "summary": "Somebody, from the default model",
        "value": {"prompt": "a woman with long red hair and glasses as a wizard in a forest"},
    },
}
Drawn = Annotated[GenerateRequest, Body(openapi_examples=EXAMPLES)]
ERRORS = error_responses(400, 413, 422, 500, 503, 507)


@router.post("/generate", summary="Draw a picture: JSON", responses=ERRORS)
async def generate_json(request: Drawn, service: ServiceDep, waiting: WaitingDep) -> GenerateResponse:
    """Draws a picture with the user's own model; answers with the PNG in base64 and where it is kept."""
    return (await waiting.run(lambda: generate(request, service.models, service.pictures))).response


@router.post(
    "/generate/image",
    summary="Draw a picture: PNG",
    response_class=Response,
    responses={
        **ERRORS,
        200: {
            "description": "The picture.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            "headers": {
                "X-Model-Used": {"description": "The model that drew it.", "schema": {"type": "string"}},
                "X-Generation-Time": {"description": "Seconds it took.", "schema": {"type": "number"}},
                "X-Seed": {"description": "The seed that draws it again.", "schema": {"type": "integer"}},
                "X-Warning": {
                    "description": "Only where a prompt was too long to be read whole; `/generate` says which words.",
                    "schema": {"type": "string"},
                },
            },
        },
    },
)
async def generate_png(request: Drawn, service: ServiceDep, waiting: WaitingDep) -> Response:
    """Draws a picture as `/generate` does; answers with the PNG itself."""
    if request.num_images != 1:
        raise InvalidRequest("/generate/image answers with one picture", "Leave num_images at 1, or use /generate.")
    done = await waiting.run(lambda: generate(request, service.models, service.pictures))
    headers = {
        "X-Model-Used": quote(done.response.model_id, safe="/:@ "),  # a header is Latin-1, a path may be anything
        "X-Generation-Time": f"{done.response.generation_time:.3f}",
        "X-Seed": str(done.response.seed),
    }
    if done.cut:
        headers["X-Warning"] = f"too long to be read whole: {', '.join(done.cut)}"
    return Response(done.png, media_type="image/png", headers=headers)
