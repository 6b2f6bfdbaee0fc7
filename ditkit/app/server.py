"""Serving the page: on this machine unless asked otherwise, and with nothing requested from anywhere else."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require

from .page import CSS, Page, theme
from .studio import Studio

POLICY = "; ".join(  # a browser then refuses whatever is not this server's own
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)


class OwnOnly:
    """ASGI middleware: a Content-Security-Policy on every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Any]) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, guarded)


class Server:
    """A page at ``url``. ``run`` serves until interrupted, or until ``stop`` is called from another thread.

    Args:
        host: address to listen on; only "127.0.0.1" and its like keep others out.
        port: 0: any that is free.

    Raises:
        DitkitError: the address cannot be had.
        MissingDependency: Gradio is not installed.
    """

    def __init__(self, studio: Studio, host: str = "127.0.0.1", port: int = 7860) -> None:
        self.socket = _listen(host, port)
        where, self.port = self.socket.getsockname()[:2]
        self.url = f"http://{f'[{where}]' if ':' in where else where}:{self.port}/"
        uvicorn = require("uvicorn", "app")
        self.page = Page(studio)
        config = uvicorn.Config(OwnOnly(_application(self.page)), log_level="warning", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve."""
        try:
            self.server.run(sockets=[self.socket])
        finally:
            for job in list(self.page.jobs.values()):
                job.stop.set()
            self.page.worker.close()
            self.socket.close()

    def stop(self) -> None:
        """End ``run``."""
        self.server.should_exit = True


def _application(page: Page) -> Any:
    fastapi, gr = require("fastapi", "app"), require("gradio", "app")
    return gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.blocks,
        path="/",
        theme=theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family[0], socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(family[4])
        found.listen(128)
    except (OSError, OverflowError) as error:
        raise DitkitError(
            f"cannot listen on {host}, port {port}: {error}", hint="another --port, or --port 0 for any that is free"
        ) from None
    return found
