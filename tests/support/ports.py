"""Free ports for servers that tests start."""

import contextlib
import random
import socket


def free_port() -> int:
    """A free port below those that the system gives to connections: none of these takes it before the server does."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise RuntimeError("wanted a free port between 20,000 and 32,000, found none of 100")
