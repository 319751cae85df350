"""The server of the page: a uvicorn whose connections are few, and end when they are slow or idle."""

import ctypes
import errno
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.themes import Default

from mvlm.app.connection import HEADER_SECONDS, MAX_CONNECTIONS, Connection
from mvlm.app.gate import ASK, Gate, questions_of
from mvlm.app.page import Page
from mvlm.app.shares import Shares
from mvlm.app.uploads import MAX_BYTES
from mvlm.errors import ConfigError

STYLE = """
.gradio-container {max-width: 960px !important; width: 100%; margin: auto}
footer {display: none !important}
.refusal {position: fixed; top: 1rem; right: 1rem; z-index: 1000; max-width: 24rem; padding: 0.75rem 1rem;
  border-radius: 0.5rem; color: #7f1d1d; background: #fee2e2; border: 1px solid #b91c1c}
"""
SCRIPT = """
<script>
const send = window.fetch;
window.fetch = async (...request) => {
  const answer = await send(...request);
  if (!answer.ok && new URL(answer.url).pathname.endsWith("ASK")) {
    const said = await answer.clone().json();
    const box = document.createElement("div");
    box.className = "refusal";
    box.setAttribute("role", "alert");
    box.textContent = new DOMParser().parseFromString(said.error, "text/html").body.textContent;
    document.body.append(box);
    setTimeout(() => box.remove(), 10000);
  }
  return answer;
};
</script>
""".replace("ASK", ASK)
"""Shows why a question is refused. Gradio shows that of its own queue alone."""
BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""
ACCEPTED = 16
"""Connections that are accepted before any of them gets or loses its place: each has a file of the process open."""
SWEEP_SECONDS = 15.0
M_ARENA_MAX = -8  # of glibc's malloc.h


class Server:
    """A page that is served from a thread, from when this is made. ConfigError if it cannot listen at `url`."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket, page: Page, url: str) -> None:
        self.url = url
        self._server, self._page = server, page
        self._ended = threading.Event()
        self._thread = threading.Thread(target=server.run, args=([listener],), name="mvlm-app", daemon=True)
        self._sweeper = threading.Thread(target=self._sweep, name="mvlm-app-sweep", daemon=True)
        self._trim = _trimmer()
        self._thread.start()
        while not server.started and self._thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise ConfigError(f"port: wanted to listen at {url}, could not; choose another --port")
        listener.listen(BACKLOG)
        self._sweeper.start()

    def wait(self) -> None:
        """Wait until the server ends. A signal interrupts that."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """End the server, and wait until it has ended."""
        self._ended.set()
        self._page.blocks.is_running = False
        self._server.should_exit = True
        self._thread.join(10)
        self._page.worker.shutdown(wait=False, cancel_futures=True)
        self._sweeper.join(10)

    def _sweep(self) -> None:
        while not self._ended.wait(SWEEP_SECONDS):
            self._page.uploads.sweep()
            for files in self._page.blocks.temp_file_sets:  # else Gradio would remember each answer's file for ever
                files.clear()
            self._trim()


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine. ConfigError if the port is in use or the host is not of this machine."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port: wanted a number from 1 to 65535, got {port}")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(f"port: wanted {host}:{port} free, got: {error}; choose another --port") from None
        raise ConfigError(f"host: wanted an address of this machine, got {host}; choose another --host") from None
    return listener


def start(page: Page, host: str, port: int, names: Sequence[str] = (), behind_proxy: bool = False) -> Server:
    """Start to serve the page from a thread.

    Args:
        names: further names of this machine, under which browsers reach it.
        behind_proxy: believe what a proxy says in X-Forwarded-For, -Host and -Proto.

    Raises:
        ConfigError: the port is in use or the host is not of this machine.
    """
    listener = bind(host, port)
    gate = Gate(gradio_app(page), questions_of(page.blocks.config), page.uploads, host, names, behind_proxy)
    shares: Shares[Connection] = Shares(MAX_CONNECTIONS)
    config = uvicorn.Config(
        gate,
        http=partial(Connection, shares=shares, visitor=gate.visitor),  # pyright: ignore[reportArgumentType]
        ws="none",
        lifespan="on",
        backlog=ACCEPTED,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(HEADER_SECONDS),
        timeout_graceful_shutdown=1,
    )
    return Server(uvicorn.Server(config), listener, page, f"http://{f'[{host}]' if ':' in host else host}:{port}")


def gradio_app(page: Page) -> FastAPI:
    """Gradio's ASGI app for the page, with all of Gradio's routes."""
    fonts = ["system-ui", "sans-serif"]  # from the visitor's machine: nothing is fetched
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        footer_links=[],
        run_history=False,
        app_kwargs={"openapi_url": None},
        show_error=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=Default(font=fonts, font_mono=["monospace"]),
        css=STYLE,
        head=SCRIPT,
    )
    page.blocks.is_running = True
    return app


def _trimmer() -> Callable[[], object]:
    """A function that gives freed memory back to the system, where the C library is glibc.

    Threads share two of glibc's arenas from here on. Else each keeps its own, and none is ever empty.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim") or not hasattr(library, "mallopt"):
        return lambda: None
    library.mallopt(M_ARENA_MAX, 2)
    return lambda: library.malloc_trim(0)
