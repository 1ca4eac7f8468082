"""GET /docs and /redoc from files of our own: they work with the network cable out."""

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse

URL = "/static/docs"

# Redoc's bundle asks a CDN for its logo and has no option against it; this keeps the pages to our own host.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; worker-src blob:"
}

router = APIRouter(include_in_schema=False)


def add_docs(app: FastAPI) -> None:
    """Serves the pages from `app`; their assets are among the pages' own."""
    app.include_router(router)


@router.get("/docs")
async def swagger() -> HTMLResponse:
    """The API to read and to try."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Sitter API",
        swagger_js_url=f"{URL}/swagger-ui-bundle.js",
        swagger_css_url=f"{URL}/swagger-ui.css",
        swagger_favicon_url=f"{URL}/favicon.svg",
        swagger_ui_parameters={"validatorUrl": None},
    )
    page.headers.update(HEADERS)
    return page


@router.get("/redoc")
async def redoc() -> HTMLResponse:
    """The API to read."""
    page = get_redoc_html(
        openapi_url="/openapi.json",
        title="Sitter API",
        redoc_js_url=f"{URL}/redoc.standalone.js",
        redoc_favicon_url=f"{URL}/favicon.svg",
        with_google_fonts=False,
    )
    page.headers.update(HEADERS)
    return page
