"""Random requests to `mvlm app`: none may end it, show its inside, fill its terminal or its memory.

    python tests/promises/faults/fuzz_page.py [--minutes 10]

Hypothesis makes them from what the page's own JavaScript sends, with parts of it replaced, and from loose bytes. Prints
a line for each two hundred. The exit code is 1 if a request did what it must not, and the smallest such one is printed.
"""

import argparse
import json
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from mvlm.training.run import pretrain
from support.models import pretrain_config
from support.page_attacks import INNARDS, png
from support.page_process import Page
from support.scenes import write_scenes
from support.visitor import API, Answer, Visitor

STATUSES = {0, 200, 304, 400, 403, 404, 405, 408, 411, 413, 414, 415, 422, 431, 501, 503}
"""What the page may answer. 500 is a fault of the page; 0 a connection that is closed without an answer."""
GROWTH = 1.10
"""Most that the page's memory may grow, from the first minute on."""

texts = st.text(max_size=30) | st.sampled_from(["a [MASK]", "a\nb", "{}", "[MASK] " * 30, "a" * 1500, "\ud800"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
known = ["UPLOAD", "EXAMPLE", "FOLDER/secret.png", "FOLDER/pipe", "/etc/passwd", "/dev/zero", "UPLOAD/../x"]
"""The words in capitals stand for paths of the run (`Fuzzer.names`)."""
images = values | st.fixed_dictionaries(
    {"path": texts | st.sampled_from(known)}, optional=dict.fromkeys(("meta", "url", "is_stream"), values)
)
questions = st.fixed_dictionaries(
    {"data": st.lists(images | texts, max_size=5) | values, "fn_index": st.integers(-1, 12) | values},
    optional=dict.fromkeys(("event_data", "trigger_id", "session_hash", "event_id", "batched"), values),
)
headers = st.dictionaries(
    st.sampled_from(["Host", "Origin", "Cookie", "Content-Type", "Content-Length", "Range", "X-Forwarded-Host",
                     "X-Forwarded-Proto", "Transfer-Encoding", "Expect", "Upgrade", "Connection", "If-None-Match"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40),
    max_size=3,
)  # fmt: skip
signs = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60)
routes = st.sampled_from(["/", "/config", f"{API}/queue/join", f"{API}/queue/data?session_hash=a", f"{API}/upload",
                          f"{API}/file=UPLOAD", f"{API}/info", f"{API}/heartbeat/a", "/static/x", "/assets/x"]) | (
    signs.map("/{}".format) | signs.map(f"{API}/file={{}}".format)
)  # fmt: skip
names = st.text(st.characters(exclude_characters='"\r\n'), max_size=40)


class Fuzzer:
    """A page, a visitor, and what has been sent."""

    def __init__(self, page: Page) -> None:
        self.page, self.sent = page, 0
        self.visitor = Visitor(page.target.url)
        self.names = {
            "UPLOAD": json.loads(self.visitor.upload("x.png", png()).body)[0],
            "EXAMPLE": self.visitor.examples[0],
            "FOLDER": str(page.target.folder),
        }
        self.lines = len(self.terminal().splitlines())

    def terminal(self) -> str:
        """What the page has written to its terminal."""
        return self.page.log.read_text("utf-8", "replace")

    def fill_in(self, value: Any) -> Any:
        """The same value with paths of this run."""
        if isinstance(value, list):
            return [self.fill_in(each) for each in value]
        if isinstance(value, dict):
            return {name: self.fill_in(each) for name, each in value.items()}
        for name, path in self.names.items() if isinstance(value, str) else ():
            value = value.replace(name, path)
        return value

    def check(self, answer: Answer) -> None:
        """Raise AssertionError if the page did what it must not."""
        self.sent += 1
        assert answer.status in STATUSES, f"{answer.status}: {answer.text[:300]}"
        assert answer.seconds < 20, f"{answer.seconds:.0f} s"
        assert answer.status < 400 or not INNARDS.search(answer.text), answer.text[:300]
        lines, self.lines = self.lines, len(self.terminal().splitlines())
        assert self.lines - lines <= 1, self.terminal()[-2000:]
        assert self.page.process.poll() is None, "the page has ended"

    def ask(self, question: dict[str, Any]) -> None:
        """Send a question, and read its answer if there is to be one."""
        question = self.fill_in({"session_hash": secrets.token_hex(4), **question})
        joined = self.visitor.join(question)
        self.check(joined)
        if joined.status == 200:
            streamed = self.visitor.request("GET", f"{API}/queue/data?session_hash={question['session_hash']}")
            self.check(streamed)
            events = [json.loads(line[5:]) for line in streamed.text.splitlines() if line.startswith("data:")]
            (done,) = [event for event in events if event["msg"] == "process_completed"]
            if not done["success"]:
                said = str(done["output"]["error"])
                assert said not in ("None", ""), streamed.text[-300:]
                assert not INNARDS.search(said), said[:300]

    def fuzz(self, examples: int, number: int) -> None:
        """Send about four times so many requests."""
        bodies = st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode())
        with_body = st.tuples(st.sampled_from(["POST", "PUT"]), st.binary(max_size=100))
        without = st.tuples(st.sampled_from(["GET", "HEAD", "OPTIONS"]), st.just(b""))

        def request(method: str, body: bytes, path: str, given_headers: dict[str, str]) -> None:
            self.check(self.visitor.request(method, self.fill_in(path), body, given_headers, 15))

        def send(act: Callable[..., None], *made: st.SearchStrategy[Any]) -> None:
            @seed(number)
            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=[
                    HealthCheck.too_slow,
                    HealthCheck.data_too_large,
                    HealthCheck.large_base_example,
                ],
                print_blob=False,
            )
            @given(st.tuples(*made))
            def each(drawn: tuple[Any, ...]) -> None:
                act(*drawn)

            each()

        send(self.ask, questions)
        send(lambda body: self.check(self.visitor.join(body)), bodies)
        send(lambda one, *rest: request(*one, *rest), with_body | without, routes, headers)
        send(lambda *parts: self.check(self.visitor.upload(*parts)), names, st.binary(max_size=300))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    logging.getLogger("mvlm").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="mvlm-fuzz-") as name:
        folder = Path(name)
        pretrain(pretrain_config(write_scenes(folder / "data"), folder / "run", checkpoint_every_steps=1))
        page = Page(folder / "run", folder)
        try:
            fuzzer = Fuzzer(page)
            began, minutes, first, memory, number = time.monotonic(), 0.0, 0.0, 0.0, chosen.seed
            while minutes < chosen.minutes:
                fuzzer.fuzz(50, number)
                assert fuzzer.visitor.ask("Search", ["a circle", None])[0], "the page does not answer any more"
                minutes, memory, number = (time.monotonic() - began) / 60, page.target.memory(), number + 1
                print(f"{minutes:.1f} minutes: {fuzzer.sent} requests, {memory:.0f} MB", flush=True)
                first = first if first or minutes < 1 else memory
            assert not first or memory <= first * GROWTH, f"memory grew from {first:.0f} to {memory:.0f} MB"
        finally:
            page.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
