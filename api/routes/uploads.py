"""Uploads that survive a lost connection: tus 1.0.0 (https://tus.io) with creation, termination and expiration.

A client that does not say which version it speaks is taken for one of this, so that curl need not.
"""

from email.utils import format_datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from api.domain import resumable
from api.domain.accounts import Caller
from api.errors import InvalidRequest, SitterError
from api.routes import forms
from api.routes.caller import CallerDep, require
from api.routes.errors import error_responses
from api.routes.limits import declared_bytes
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.models import UploadState

VERSION = "1.0.0"
PIECE = "application/offset+octet-stream"


class OtherVersion(SitterError):
    """The client speaks another version of tus."""

    status = 412
    code = "other_version"
    hint = f"Speak tus {VERSION}: Tus-Resumable: {VERSION}."


class NoPiece(SitterError):
    """The body of a PATCH is not said to be a piece of an upload."""

    status = 415
    code = "unsupported_media_type"
    hint = f"Send Content-Type: {PIECE}."


class _Tus(APIRoute):
    """A route whose every answer says which version of tus it is."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers."""

        async def said(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = ["Tus-Resumable", *(["Tus-Version"] if message["status"] == OtherVersion.status else [])]
                headers = [(name.lower().encode(), VERSION.encode()) for name in names]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await super().handle(scope, receive, said)


async def _speaks(
    tus_resumable: Annotated[str | None, Header(description="The client's version of tus.", examples=[VERSION])] = None,
) -> None:
    if tus_resumable not in (None, VERSION):
        raise OtherVersion(f"this is tus {VERSION}")


router = APIRouter(
    prefix="/uploads",
    tags=["Models"],
    route_class=_Tus,
    dependencies=[Depends(require("manage")), Depends(_speaks)],
)

UploadId = Annotated[Id, Path(description="Names the upload.", examples=["019a9f3c2d10b1946ac93f21d07e"])]
HEADERS: dict[str, Any] = {
    "Upload-Offset": {"description": "Bytes that are there.", "schema": {"type": "integer"}},
    "Upload-Expires": {"description": "When it is given up, if nothing more comes.", "schema": {"type": "string"}},
}
BODY = {"requestBody": {"required": True, "content": {PIECE: {"schema": forms.FILE}}}}


@router.post(
    "",
    status_code=201,
    summary="Begin an upload in pieces",
    responses=error_responses(401, 403, 412, 413, 422, 429, 503, 507),
)
async def begin_upload(
    service: ServiceDep,
    caller: CallerDep,
    response: Response,
    upload_length: Annotated[int, Header(description="Bytes of the whole file.", ge=1, examples=[801_000])],
    upload_metadata: Annotated[
        str | None,
        Header(
            description="`filename`, in base64: a .safetensors file, or a .zip of a model's folder.",
            max_length=2000,
            pattern="^[ -~]*$",
            examples=["filename ZXZlLnNhZmV0ZW5zb3Jz"],
        ),
    ] = None,
) -> UploadState:
    """Begins an upload: send its bytes with PATCH, then name it as `upload` in POST /models."""
    upload = await resumable.begin(
        service.settings, service.database, service.folder, _owner(caller), upload_length, upload_metadata or ""
    )
    _tell(response, upload)
    response.headers["Location"] = f"/uploads/{upload.id}"
    return upload


@router.head(
    "/{upload_id}",
    summary="Ask how far an upload is",
    response_class=Response,
    responses={200: {"description": "How far it is.", "headers": HEADERS}, **error_responses(401, 403, 404, 412, 422)},
)
async def look_at_upload(upload_id: UploadId, service: ServiceDep, caller: CallerDep) -> Response:
    """Says how many bytes are there: go on from that offset."""
    response = Response(headers={"Cache-Control": "no-store"})
    upload = await resumable.find(service.folder.uploads, _owner(caller), upload_id)
    _tell(response, upload)
    response.headers["Upload-Length"] = str(upload.length)
    if upload.metadata:
        response.headers["Upload-Metadata"] = upload.metadata
    return response


@router.patch(
    "/{upload_id}",
    status_code=204,
    summary="Send a piece of an upload",
    responses={
        204: {"description": "It is on the disk.", "headers": HEADERS},
        **error_responses(401, 403, 404, 408, 409, 412, 413, 415, 422, 429, 503, 507),
    },
    dependencies=[Depends(forms.one_body)],
    openapi_extra=BODY,
)
async def send_piece(
    upload_id: UploadId,
    http: Request,
    service: ServiceDep,
    caller: CallerDep,
    response: Response,
    upload_offset: Annotated[int, Header(description="Where the piece begins.", ge=0, examples=[0])],
) -> None:
    """Appends the body. Whatever of it came before the connection was lost stays."""
    if http.headers.get("Content-Type", "").lower() != PIECE:
        raise NoPiece("this is not said to be a piece of an upload")
    declared = declared_bytes(http.scope)
    try:
        upload = await resumable.append(
            service.folder.uploads, _owner(caller), upload_id, upload_offset, declared, http.stream()
        )
    except ClientDisconnect as error:
        raise InvalidRequest("the piece broke off") from error  # for the log: nobody is there to be told
    _tell(response, upload)


@router.delete(
    "/{upload_id}",
    status_code=204,
    summary="End an upload",
    responses=error_responses(401, 403, 404, 412, 422, 429, 503),
)
async def end_upload(upload_id: UploadId, service: ServiceDep, caller: CallerDep) -> None:
    """Removes what came so far."""
    await resumable.end(service.folder.uploads, _owner(caller), upload_id)


def _owner(caller: Caller) -> str:
    """Returns whose an upload is: its sender's, and nobody else's, whoever the model is for."""
    return caller.acts_for(None)


def _tell(response: Response, upload: UploadState) -> None:
    response.headers["Upload-Offset"] = str(upload.offset)
    response.headers["Upload-Expires"] = format_datetime(upload.expires_at, usegmt=True)
