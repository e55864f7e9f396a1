"""Serving the page: on this machine alone unless asked otherwise, and with nothing from outside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from cachekit.errors import CachekitError

__all__ = ["LOCAL", "Guard", "serve"]

LOCAL = "127.0.0.1"
#: Browsers load nothing from other hosts, and other pages can't frame this one. Its scripts stand in the page itself.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
#: Names of this machine.
_NAMES = (LOCAL, "localhost")


class Guard:
    """Middleware that forbids a browser to load from elsewhere, and refuses requests for other names of the host.

    The second keeps pages of other sites away, whose names could be made to lead to this machine.
    """

    def __init__(self, app: Any, hosts: Sequence[str] = ()) -> None:
        """Stand before `app`; without `hosts` every name is answered."""
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rpartition(":")[0]
        if self._hosts and host not in self._hosts:
            await send({"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this host has another name\n"})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._app(scope, receive, guarded)


def serve(
    model: str,
    specs: Sequence[str],
    host: str = LOCAL,
    port: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[Any, str]:
    """Start to serve the page in threads of this process; the server, which has `close()`, and the page's address.

    Raises a `CachekitError` where gradio is missing, the model or a spec can't be used, or the port is taken. By
    default the port is the first free one from 7860 on.
    """
    # Read when gradio is imported, which then asks nobody about its version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if find_spec("gradio") is None:
        raise CachekitError("the app needs gradio, which is not installed; pip install 'cachekit-diffusion[app]'")
    from cachekit.registry.catalog import installed
    from cachekit.tools.app.desk import Desk
    from cachekit.tools.app.drawing import Studio
    from cachekit.tools.app.page import Page

    blocks = Page(Desk(installed(), Studio(device, dtype))).build(model, specs)
    try:
        _, address, _ = _launch(blocks, host, port)
    except OSError as error:
        raise CachekitError(f"cannot listen on {host}, port {port or 'any'}: {error}; give another --port") from error
    return blocks, address


def _launch(blocks: Any, host: str, port: int | None) -> Any:
    import gradio
    from starlette.middleware import Middleware

    from cachekit.tools.app.page import STYLE

    guard = Middleware(Guard, hosts=_NAMES if host in _NAMES else ())
    return blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        theme=gradio.themes.Base(),
        css=STYLE,
        app_kwargs={"middleware": [guard]},
    )
