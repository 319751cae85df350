"""A gate in front of a TCP server, which tests close: the server is then away, or gone in the middle of a transfer."""

import contextlib
import math
import socket
import threading
from collections.abc import Iterator


class Gate:
    """Passes connections on to a server while it is open.

    Args:
        server: host and port.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self._server, self._lock = server, threading.Lock()
        self._pairs: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._open, self._refuses = True, math.inf
        self._shut_later: tuple[float, float] = math.inf, math.inf
        self.sent = 0
        """Bytes that clients have sent to the server."""
        self.refused = 0
        """Connections that came while the gate was closed."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self, refuses: float = math.inf) -> None:
        """Break all connections, and accept no more until so many were refused."""
        with self._lock:
            self._open, self._refuses = False, self.refused + refuses
            for one in self._pairs:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def shut_later(self, sent: int, refuses: float) -> None:
        """`shut` once clients have sent so many bytes more."""
        self._shut_later = self.sent + sent, refuses

    def open(self) -> None:
        self._open = True

    def close(self) -> None:
        """Break all connections, and wait until their sockets are closed."""
        self.shut()
        self._listener.close()
        for one in self._threads:
            one.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if not self._open:
                    self.refused += 1
                    self._open = self.refused >= self._refuses
                    client.close()
                    continue
                self._threads.append(threading.Thread(target=self._connect, args=(client,), daemon=True))
                self._threads[-1].start()

    def _connect(self, client: socket.socket) -> None:
        """Pass bytes in both directions until either side ends."""
        with contextlib.suppress(OSError), client, socket.create_connection(self._server) as server:
            with self._lock:
                if not self._open:
                    return
                self._pairs |= {client, server}
            up = threading.Thread(target=self._pass, args=(client, server, True), daemon=True)
            up.start()
            self._pass(server, client, False)
            up.join()

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 16):
                self.sent += len(block) if up else 0
                if self.sent > self._shut_later[0]:
                    _, refuses = self._shut_later
                    self._shut_later = math.inf, math.inf
                    self.shut(refuses)
                sink.sendall(block)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def gate_of(address: str) -> Iterator[Gate]:
    """A gate in front of http://HOST:PORT."""
    host, _, port = address.removeprefix("http://").partition(":")
    gate = Gate((host, int(port)))
    try:
        yield gate
    finally:
        gate.close()
