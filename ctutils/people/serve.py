"""`ctutils serve`: the page of predictions with an upload box, on this machine alone unless told otherwise.

Plain ASGI rather than gradio: on top of the course's packages starlette, uvicorn and python-multipart are 1 MB in 3
packages, gradio is 123 MB in 27; and the page is the one of `ctutils predict --html`.

Nothing is kept: an upload is in memory, or above 1 MB in a temporary file without a name.
"""

import argparse
import contextlib
import ipaddress
import json
import socket
import threading
from collections.abc import Sequence

from ctutils.base import CTError
from ctutils.data import SliceFolder
from ctutils.people.command import load_predictor
from ctutils.people.page import render
from ctutils.people.predict import Predictor

MOST_FILES = 1000  # in one upload


def make_app(predictor: Predictor, folder: SliceFolder | None, notes: Sequence[str], host: str, limit_mb: int):
    """Return the server as a Starlette application: one page, "/", that takes files and shows what the model says.

    Args:
        predictor, folder, notes: as `load_predictor` gives them.
        host: what it listens on; asked for by another name, a loopback address does not answer.
        limit_mb: of one upload, all files together; a larger one is refused before it is read.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    one_at_a_time = threading.Lock()  # the network's hooks and the decoders' warnings are of the whole process

    class Refused(HTMLResponse):
        """An answer that is sent at once; what the browser still sends is thrown away, or it would not look at it."""

        async def __call__(self, scope, receive, send) -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.body", "body": b""})

    def page(slices=(), failed=None, wrong: str = "") -> str:
        said = [wrong] if wrong else notes
        return render(predictor, slices, failed or {}, folder=folder, warnings=said, limit_mb=limit_mb)

    def answer(files) -> str:
        with one_at_a_time:
            return page(*predictor.predict_contents([(one.filename, one.file.read) for one in files], heat=True))

    async def index(request: Request) -> Response:
        kept = {"cache-control": "no-store"}
        if request.method != "POST":
            return HTMLResponse(page(), headers=kept)
        size = request.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > limit_mb * 1_000_000:
            had = f"{int(size) / 1e6:.1f} MB" if size.isdecimal() else "an upload that does not say its size"
            wrong = f"Not read: {had}. At most {limit_mb} MB are taken at a time: send fewer or smaller files."
            return Refused(page(wrong=wrong), 413, headers=kept)
        try:
            async with request.form(max_files=MOST_FILES) as form:
                files = [one for one in form.getlist("files") if getattr(one, "filename", "")]
                if not files:
                    return HTMLResponse(page(wrong="No file was sent. Choose one or more."), 400, headers=kept)
                return HTMLResponse(await run_in_threadpool(answer, files), headers=kept)
        except HTTPException as error:
            with contextlib.suppress(RuntimeError, ClientDisconnect):  # the rest, unless there is none
                async for _ in request.stream():
                    pass
            return HTMLResponse(page(wrong=f"Not read: {error.detail}"), error.status_code, headers=kept)
        except ClientDisconnect:
            return Response()

    names = ["127.0.0.1", "localhost", "[::1]"] if is_loopback(host) else ["*"]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=[*names, host], www_redirect=False)
    return Starlette(routes=[Route("/", index, methods=["GET", "POST"])], middleware=[guard])


def is_loopback(host: str) -> bool:
    """Say whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(options: argparse.Namespace) -> None:
    """Run `ctutils serve` until Ctrl-C.

    Raises:
        CTError: packages of the extra `demo` that are not installed; no such run; a port that is not free.
    """
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        mend = "pip install 'chest-ct-course[demo]', or use ctutils predict --html, which needs nothing"
        raise CTError(f"no package {error.name}", "starlette, uvicorn and python-multipart", mend) from error
    host, family = options.host, socket.AF_INET6 if ":" in options.host else socket.AF_INET
    if options.limit_mb < 1:
        raise CTError(f"--limit-mb {options.limit_mb}", "1 or more", "name a size in MB")
    try:
        listening = socket.create_server((host, options.port), family=family)
    except (OSError, OverflowError) as error:
        found = f"no way to listen on {host}, port {options.port} ({getattr(error, 'strerror', None) or error})"
        raise CTError(
            found, "an address of this machine and a free port", "choose another --port, such as 0"
        ) from error
    with listening:
        predictor, folder, notes = load_predictor(options, slices=True)
        app = make_app(predictor, folder, notes, host, options.limit_mb)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
        lines = [f"'{predictor.run.name}' on {url} (Ctrl-C ends it)", *notes]
        lines += [] if is_loopback(host) else ["Whoever reaches this machine can use it; nothing is encrypted."]
        text = "\n".join([*lines, "Not for clinical use."])
        print(json.dumps({"url": url, "notes": notes}) if options.json else text, flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has closed all, and passes it on
            uvicorn.Server(config).run([listening])
