"""The paths of the service; FastAPI describes them at /docs and /openapi.json."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import swagger_ui_bundle
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from cdt_runtime import __version__
from cdt_runtime.console import one_line
from cdt_runtime.enroll import versions
from cdt_runtime.errors import BackendError, CdtError, InputError
from cdt_runtime.evidence.found import find_evidence
from cdt_runtime.evidence.page import tile_page
from cdt_runtime.prediction import Context, TileInput
from cdt_runtime.report import NOTICE, as_record, bundle_name
from cdt_runtime.serve.engine import Engine
from cdt_runtime.serve.guard import App, Guard, Limits
from cdt_runtime.serve.metrics import Metrics
from cdt_runtime.serve.uploads import stored

PAGE = Path(__file__).parent / "page"
MAX_TILES = 200
"""Files of one request."""

Tile = Annotated[
    list[UploadFile],
    File(description="A TIFF, PNG or JPEG file; or one file a marker, named after it."),
]
Ct = Annotated[str | None, Form(description="Name of a CT, as /v1/scans lists them.")]
Channels = Annotated[
    str | None, Form(description="Channel names of a tile that carries none, with commas.")
]
Mpp = Annotated[float | None, Form(gt=0, allow_inf_nan=False, description="Microns a pixel.")]
Fill = Annotated[bool, Form(description="Fill channels that the tile lacks with zeros.")]
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "No token, or a wrong one."},
    413: {"description": "The upload is too large."},
    422: {"description": "An input can't be used; `error` says why, in one line."},
    503: {"description": "Too much at once, or it took too long: try again."},
}


def make_app(
    engine: Engine, metrics: Metrics, token: str, limits: Limits, *, read_only: bool
) -> App:
    """Make the application.

    Args:
        engine: that answers.
        metrics: to count in.
        token: that a request has to bear.
        limits: of requests.
        read_only: no class can be enrolled.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(
        title="CDT Edge",
        version=__version__,
        description=f"Few-shot classification of pathology tiles. {NOTICE}",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
    )
    _add_errors(app)
    _add_page(app)
    _add_state(app, engine, metrics, read_only)
    _add_answers(app, engine)
    if not read_only:
        _add_enrolment(app, engine)
    _describe(app)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    return Guard(app, token, limits, paths, metrics)


def _describe(app: FastAPI) -> None:
    """Say in the schema that requests bear a token, in a version that the bundled page reads."""
    app.openapi_version = "3.0.3"
    schema = _in_3_0(app.openapi())
    schema.setdefault("components", {})["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer"}
    }
    schema["security"] = [{"token": []}]
    app.openapi_schema = schema


def _in_3_0(value: Any) -> Any:
    """Say of files, bounds and what may be left out in OpenAPI 3.0 what FastAPI says in 3.1."""
    if isinstance(value, list):
        return [_in_3_0(one) for one in value]
    if not isinstance(value, dict):
        return value
    said = {name: _in_3_0(one) for name, one in value.items()}
    if said.pop("contentMediaType", None):
        said["format"] = "binary"
    if {"type": "null"} in said.get("anyOf", ()):
        (kind,) = [one for one in said.pop("anyOf") if one != {"type": "null"}]
        said |= {**kind, "nullable": True}
    if isinstance(said.get("exclusiveMinimum"), int | float):
        said |= {"minimum": said["exclusiveMinimum"], "exclusiveMinimum": True}
    return said


def _add_errors(app: FastAPI) -> None:
    """Each error is JSON with one line."""

    @app.exception_handler(CdtError)
    async def mendable(request: Request, error: CdtError) -> Response:
        status = 500 if isinstance(error, BackendError) else 422
        return JSONResponse({"error": one_line(error)}, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
        return JSONResponse({"error": one_line("; ".join(told))}, 422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": one_line(error.detail)}, error.status_code, error.headers)


def _add_page(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=PAGE), "static")
    docs = swagger_ui_bundle.swagger_ui_path
    app.mount("/docs/files", StaticFiles(directory=docs), "docs files")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="CDT Edge: paths",
            swagger_js_url="/docs/files/swagger-ui-bundle.js",
            swagger_css_url="/docs/files/swagger-ui.css",
            swagger_favicon_url="/static/icon.svg",
        )


def _add_state(app: FastAPI, engine: Engine, metrics: Metrics, read_only: bool) -> None:
    @app.get("/health/live", tags=["state"])
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.get("/health/ready", tags=["state"])
    async def ready() -> dict[str, str]:
        """The model is loaded."""
        return {"status": "ready"}

    @app.get("/metrics", tags=["state"])
    async def counted() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/v1/model", tags=["state"])
    async def model() -> dict[str, Any]:
        """Classes, bundle and engine."""
        classifier = engine.classifier
        bundle = classifier.bundle
        return {
            "classes": classifier.prototypes.counts(),
            "channels": classifier.preprocess.channels,
            "min_confidence": classifier.prototypes.min_confidence,
            "ct_off": classifier.prototypes.ct_off,
            "bundle": bundle_name(bundle),
            "backend": classifier.engine,
            "training_data": bundle.manifest["training"]["data"],
            "versions": versions(bundle, classifier.prototypes),
            "read_only": read_only,
            "notice": NOTICE,
        }

    @app.get("/v1/scans", tags=["state"])
    async def scans() -> dict[str, list[str]]:
        """Names of the CTs that a request can refer to."""
        return {"scans": engine.scans.names()}


def _add_answers(app: FastAPI, engine: Engine) -> None:
    @app.post("/v1/classify", tags=["answers"])
    async def classify(
        tile: Tile,
        ct: Ct = None,
        channels: Channels = None,
        mpp: Mpp = None,
        fill_missing: Fill = False,
    ) -> Response:
        """Classify a tile; the object is that of `cdt-infer --json`."""
        reading = {"channels": _names(channels), "mpp": mpp, "fill_missing": fill_missing}
        read, context = await _read(engine, tile, ct, reading)
        answer = await engine.classify(read, context)
        return JSONResponse(as_record(answer, engine.classifier))

    @app.post("/v1/card", tags=["answers"], response_class=HTMLResponse)
    async def card(
        tile: Tile,
        ct: Ct = None,
        channels: Channels = None,
        mpp: Mpp = None,
        fill_missing: Fill = False,
    ) -> HTMLResponse:
        """Show what the answer on a tile rests on: a page that needs nothing else."""
        reading = {"channels": _names(channels), "mpp": mpp, "fill_missing": fill_missing}
        read, context = await _read(engine, tile, ct, reading)

        def made() -> str:
            classifier = engine.classifier
            scan = engine.scans.folder(ct) if ct else None
            read_ct = (
                (lambda: classifier.contexts.input_of_folder(scan, None, False)) if scan else None
            )
            return tile_page(find_evidence(classifier, read, context, read_ct), classifier)

        return HTMLResponse(await engine.run(made))


async def _read(
    engine: Engine, files: list[UploadFile], ct: str | None, reading: dict[str, Any]
) -> tuple[TileInput, Context]:
    """Read the tile and the CT of a request."""
    async with stored(_some(files)) as paths:
        context = await engine.context(ct)
        return await engine.read(_one(paths), _shown(paths), **reading), context


def _add_enrolment(app: FastAPI, engine: Engine) -> None:
    @app.post("/v1/enrol", tags=["classes"])
    async def enrol(
        label: Annotated[str, Form(description="The class; a new one, or one that is there.")],
        tiles: Annotated[list[UploadFile], File(description="Its tiles, a file each.")],
        dry_run: Annotated[bool, Form(description="Tell what would change.")] = False,
        ct: Ct = None,
        channels: Channels = None,
        mpp: Mpp = None,
    ) -> Response:
        """Add tiles to a class; the object is that of `cdt-enroll --json`."""
        async with stored(_some(tiles)) as paths:
            facts = await engine.enrol(
                paths, label, ct, dry_run=dry_run, channels=_names(channels), mpp=mpp
            )
        facts.pop("path")
        return JSONResponse(facts)


def _some(files: list[UploadFile]) -> list[UploadFile]:
    if not 0 < len(files) <= MAX_TILES:
        raise InputError(f"{len(files)} files: expected 1 to {MAX_TILES}")
    return files


def _one(paths: list[Path]) -> Path:
    """A tile's file, or of a file a marker their folder."""
    return paths[0] if len(paths) == 1 else paths[0].parent


def _shown(paths: list[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"


def _names(channels: str | None) -> list[str] | None:
    return [name.strip() for name in channels.split(",")] if channels else None
