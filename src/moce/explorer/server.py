"""The page and its data over HTTP, for one user on this machine.

Nothing is asked of another host: the page's own files are all there is, and its content security policy
forbids the rest. Requests that name another host, and writes that do not come from the page, are
refused, so that no other page that is open in the browser can reach it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from aiohttp import web

from moce.customization.selection import Choice
from moce.errors import MoceError
from moce.explorer.explorer import Dropped, Explorer, file_name
from moce.explorer.pictures import picture_of, thumbnail
from moce.models.encoder import input_channels

PAGE = Path(__file__).parent / "page"
FILES = {
    "explore.js": "text/javascript",
    "plot.js": "text/javascript",
    "explore.css": "text/css",
    "icon.svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
ANY = {"0.0.0.0", "::", ""}
FROM_PAGE = "X-Moce"  # a header that a page of another host cannot send
MOST_FILES, MOST_BYTES = 500, 2**31  # of one drop
MOST_KEPT = 20  # drops, of which the files are kept
SIZES = range(16, 513)  # pixels of a thumbnail
CACHED = {"Cache-Control": "max-age=3600"}
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Wanted:
    """What to export. images: a folder of dropped ones; route: of a cluster; one of the two is None."""

    images: Path | None
    route: str | None
    strategy: str
    format: str
    name: str


@dataclass
class Status:
    """How far the map is; explorer: when it is ready; error: why it never will be."""

    facts: dict[str, Any]
    stage: str = "starting"
    done: int = 0
    total: int = 0
    explorer: Explorer | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        names = ("facts", "stage", "done", "total", "error")
        return {"ready": self.explorer is not None, **{name: getattr(self, name) for name in names}}


@dataclass
class Server:
    """Answers the page. status: is filled by another thread; export: writes a backbone."""

    status: Status
    export: Callable[[Wanted], dict[str, Any]]
    host: str = "127.0.0.1"
    _dropped: dict[str, Dropped] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._models = ThreadPoolExecutor(1, "explore")  # one job of the models at a time
        self._root = TemporaryDirectory(prefix="moce-explore-")

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guarded], client_max_size=MOST_BYTES)
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/page/{name}", self._file),
                web.get("/api/status", self._status),
                web.get("/api/map", self._map),
                web.get("/api/thumbnail/{point}", self._thumbnail),
                web.get("/api/cluster/{number}", self._cluster),
                web.post("/api/drop", self._drop),
                web.get("/api/drop/{key}", self._look_up),
                web.get("/api/drop/{key}/thumbnail/{row}", self._dropped_thumbnail),
                web.get("/api/drop/{key}/pictures/{row}", self._pictures),
                web.post("/api/export", self._export),
            ]
        )
        app.on_cleanup.append(self._clean_up)
        return app

    async def _clean_up(self, app: web.Application) -> None:
        self._models.shutdown(wait=False, cancel_futures=True)
        self._root.cleanup()

    # --- the way in -------------------------------------------------------------------------------

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse strangers; turn errors into JSON, and forbid what the page needs not."""
        name = _host_name(request.host)
        if self.host not in ANY and name not in LOOPBACK | {self.host}:
            return _failed(403, f"this page is not served as {name}")
        if request.method == "POST" and FROM_PAGE not in request.headers:
            return _failed(403, "only the page itself may do this")
        try:
            response = await handler(request)
        except MoceError as error:
            response = _failed(400, str(error))
        except web.HTTPException as error:
            response = _failed(error.status, error.reason)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=(PAGE / "index.html").read_text("utf-8"), content_type="text/html")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in FILES:
            raise web.HTTPNotFound
        return web.Response(text=(PAGE / name).read_text("utf-8"), content_type=FILES[name])

    # --- the map ----------------------------------------------------------------------------------

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.status.to_json())

    async def _map(self, request: web.Request) -> web.StreamResponse:
        explorer = self._explorer()
        text = await asyncio.to_thread(lambda: json.dumps(explorer.map()))
        return web.json_response(text=text)

    async def _thumbnail(self, request: web.Request) -> web.StreamResponse:
        explorer, point = self._explorer(), _number(request, "point")
        if point >= len(explorer.ids):
            raise web.HTTPNotFound
        return await _image(lambda: explorer.thumbnail(point, _size(request)))

    async def _cluster(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._explorer().cluster(_number(request, "number")))

    def _explorer(self) -> Explorer:
        if self.status.explorer is None:
            raise MoceError(f"the map is not ready yet: {self.status.stage}")
        return self.status.explorer

    async def _with_models(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._models, work)

    # --- images of the user -----------------------------------------------------------------------

    async def _drop(self, request: web.Request) -> web.StreamResponse:
        explorer = self._explorer()
        key = secrets.token_hex(6)
        folder = Path(self._root.name) / key
        folder.mkdir()
        names = await _save_files(request, folder)
        self._dropped[key] = await self._with_models(lambda: explorer.drop(folder, names))
        while len(self._dropped) > MOST_KEPT:
            _remove(self._dropped.pop(next(iter(self._dropped))))
        return web.json_response({"key": key})

    async def _look_up(self, request: web.Request) -> web.StreamResponse:
        explorer, dropped, strategy = self._explorer(), self._found(request), _strategy(request)
        return web.json_response(
            await self._with_models(lambda: explorer.look_up(dropped, strategy))
        )

    async def _dropped_thumbnail(self, request: web.Request) -> web.StreamResponse:
        sample, size = self._sample(request), _size(request)
        channels = input_channels(self._explorer().clusters.encoder)
        return await _image(lambda: thumbnail(sample, size, channels))

    async def _pictures(self, request: web.Request) -> web.StreamResponse:
        """An image of the user as each model fills it in."""
        explorer, dropped, sample = self._explorer(), self._found(request), self._sample(request)
        strategy = _strategy(request)

        def work() -> dict[str, Any]:
            choice: Choice | None = explorer.choose(dropped, strategy)
            pictures = explorer.reconstructor.fill_in(sample, choice)
            shown = [
                {"label": p.label, "error": p.error, "picture": _data_uri(picture_of(p.pixels))}
                for p in pictures
            ]
            return {"pictures": shown, "note": explorer.reconstructor.note}

        return web.json_response(await self._with_models(work))

    def _found(self, request: web.Request) -> Dropped:
        dropped = self._dropped.get(request.match_info["key"])
        if dropped is None:
            raise MoceError("these images are gone: drop them again")
        return dropped

    def _sample(self, request: web.Request) -> Any:
        samples, row = self._found(request).samples, _number(request, "row")
        if row >= len(samples):
            raise web.HTTPNotFound
        return samples[row]

    # --- export -----------------------------------------------------------------------------------

    async def _export(self, request: web.Request) -> web.StreamResponse:
        try:
            given = {str(name): str(value) for name, value in (await request.json()).items()}
        except (ValueError, AttributeError):
            raise MoceError("an export is described by a JSON object") from None
        key = given.get("drop")
        if key is not None and key not in self._dropped:
            raise MoceError("these images are gone: drop them again")
        wanted = Wanted(
            self._dropped[key].folder if key else None,
            given.get("route"),
            given.get("strategy", "auto"),
            given.get("format", "timm"),
            given.get("name", ""),
        )
        return web.json_response(await self._with_models(lambda: self.export(wanted)))


# --- requests and answers -------------------------------------------------------------------------


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _failed(status: int, reason: str) -> web.Response:
    return web.json_response({"error": " ".join(reason.split())}, status=status)


def _number(request: web.Request, name: str) -> int:
    text = request.match_info[name]
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise web.HTTPNotFound
    return int(text)


def _size(request: web.Request) -> int:
    text = request.query.get("size", "96")
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and int(text) in SIZES):
        raise MoceError(f"a thumbnail has {SIZES.start} to {SIZES.stop - 1} pixels a side")
    return int(text)


def _strategy(request: web.Request) -> str:
    return request.query.get("strategy", "auto")


async def _image(work: Callable[[], bytes]) -> web.StreamResponse:
    try:
        body = await asyncio.to_thread(work)
    except Exception as error:  # decoders raise errors of any type
        return _failed(404, f"cannot read this image: {error}")
    return web.Response(body=body, content_type="image/webp", headers=CACHED)


async def _save_files(request: web.Request, folder: Path) -> dict[str, str]:
    """Save uploaded files; what the user calls each. Raises MoceError if there are none, or too many."""
    if not request.content_type.startswith("multipart/"):
        raise MoceError("images are sent as a form of files")
    names: dict[str, str] = {}
    reader = await request.multipart()
    while (part := await reader.next()) is not None:
        name = getattr(part, "filename", None)
        if name is None:
            continue
        if len(names) == MOST_FILES:
            raise MoceError(f"at most {MOST_FILES} files at once; more: moce customize RUN FOLDER")
        file = file_name(len(names), name)
        with (folder / file).open("wb") as saved:
            while chunk := await part.read_chunk(2**18):  # type: ignore[union-attr]
                saved.write(chunk)
        names[file] = name
    if not names:
        raise MoceError("no file was dropped")
    return names


def _remove(dropped: Dropped) -> None:
    for path in dropped.folder.iterdir():
        path.unlink()
    dropped.folder.rmdir()


def _data_uri(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


# --- serving --------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises MoceError if the port is taken or the host is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MoceError(
            f"cannot listen on {host}, port {port}: {reason.lower()}; give another --port (0: any "
            "free one) or --host"
        ) from None


def address(listener: socket.socket) -> str:
    """The URL of the page."""
    host, port = listener.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"


def serve(server: Server, listener: socket.socket, ended: threading.Event) -> None:
    """Serve until `ended` is set. For a thread of its own: a notebook has a loop in the main one."""
    asyncio.run(_serve(server, listener, ended))


async def _serve(server: Server, listener: socket.socket, ended: threading.Event) -> None:
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    await asyncio.to_thread(ended.wait)
    await runner.cleanup()
