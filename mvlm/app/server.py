"""The server of the page: a uvicorn whose connections are few, and end when they are slow or idle."""

import ctypes
import errno
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.themes import Default
from uvicorn.protocols.http.h11_impl import H11Protocol

from mvlm.app.gate import Gate, questions_of
from mvlm.app.page import Page
from mvlm.app.visitors import MAX_BYTES
from mvlm.errors import ConfigError

STYLE = """
.gradio-container {max-width: 960px !important; width: 100%; margin: auto}
footer {display: none !important}
"""
MAX_CONNECTIONS = 256
"""Open connections. Where there are more, one that is idle or only listens is closed, the oldest first."""
HEADER_SECONDS = 10.0
"""Longest time without a whole request, from the first byte of a connection or the end of the last answer."""
WRITE_SECONDS = 30.0
"""Longest time in which a visitor takes nothing of an answer."""
SWEEP_SECONDS = 15.0
M_ARENA_MAX = -8  # of glibc's malloc.h
MAX_SESSIONS = 64
"""Sessions of which Gradio remembers what was last sent and answered. It does without those that it forgets."""


class Server:
    """A page that is served from a thread, from when this is made. ConfigError if it cannot listen at `url`."""

    def __init__(self, server: uvicorn.Server, page: Page, url: str) -> None:
        self.url = url
        self._server, self._page = server, page
        self._ended = threading.Event()
        self._thread = threading.Thread(target=server.run, name="mvlm-app", daemon=True)
        self._sweeper = threading.Thread(target=self._sweep, name="mvlm-app-sweep", daemon=True)
        self._trim = _trimmer()
        self._thread.start()
        while not server.started and self._thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise ConfigError(f"port: wanted to listen at {url}, could not; choose another --port")
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
            self._forget()
            self._trim()

    def _forget(self) -> None:
        """Let Gradio forget what it would remember for ever: every answer's file, and every session."""
        for files in self._page.blocks.temp_file_sets:
            files.clear()
        sessions = getattr(self._page.blocks._queue, "pending_event_ids_session", {})
        for session in list(sessions):
            if not self._page.visitors.knows(session):
                sessions.pop(session, None)


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if the port is in use or the host is not of this machine."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port: wanted a number from 1 to 65535, got {port}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError(f"port: wanted {host}:{port} free, got: {error}; choose another --port") from None
            raise ConfigError(f"host: wanted an address of this machine, got {host}; choose another --host") from None


def start(page: Page, host: str, port: int, names: Sequence[str] = ()) -> Server:
    """Start to serve the page from a thread.

    Args:
        names: further names of this machine, under which browsers reach it.

    Raises:
        ConfigError: the port is in use or the host is not of this machine.
    """
    check_address(host, port)
    gate = Gate(gradio_app(page), questions_of(page.blocks.config), page.uploads, page.visitors, host, names)
    config = uvicorn.Config(
        gate,
        host=host,
        port=port,
        http=Connection,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(HEADER_SECONDS),
        timeout_graceful_shutdown=1,
    )
    return Server(uvicorn.Server(config), page, f"http://{f'[{host}]' if ':' in host else host}:{port}")


def gradio_app(page: Page) -> FastAPI:
    """Gradio's ASGI app for the page, with all of Gradio's routes."""
    fonts = ["system-ui", "sans-serif"]  # from the visitor's machine: nothing is fetched
    page.blocks.state_session_capacity = MAX_SESSIONS
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
    )
    page.blocks.is_running = True
    return app


class Connection(H11Protocol):
    """A connection that ends if its visitor sends or takes nothing for long, or if others need its place."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._opened = self._since = self._flowing = self.loop.time()
        self._unsent = 0
        others = [each for each in self.connections if isinstance(each, Connection) and not each.transport.is_closing()]
        if len(others) > MAX_CONNECTIONS:
            min([each for each in others if each.gives_way] or [self], key=lambda each: each._opened).transport.abort()
        self._watch = self.loop.call_later(1.0, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    @property
    def is_busy(self) -> bool:
        """True while a whole request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def gives_way(self) -> bool:
        """True if it is idle, or waits for answers."""
        return not self.is_busy or self.scope["path"].endswith("/queue/data")

    def _look(self) -> None:
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._flowing = now
        self._unsent = unsent
        if self.is_busy:
            self._since = now
        if now - self._since > HEADER_SECONDS or now - self._flowing > WRITE_SECONDS:
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(1.0, self._look)


def _trimmer() -> Callable[[], object]:
    """A function that gives freed memory back to the system, where the C library is glibc.

    Threads share two of glibc's arenas from here on. Else each keeps its own, and none is ever empty.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim") or not hasattr(library, "mallopt"):
        return lambda: None
    library.mallopt(M_ARENA_MAX, 2)
    return lambda: library.malloc_trim(0)
