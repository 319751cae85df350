"""Random requests to `mvlm app`: none may end it, show its inside, fill its terminal or its memory.

    python tests/promises/faults/fuzz_page.py [--minutes 10]

Hypothesis makes them from what the page's own JavaScript sends, with parts of it replaced, and from loose bytes. Prints
a line for each minute. The exit code is 1 if a request did what it must not, and the smallest such one is printed.
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

texts = st.one_of(
    st.text(max_size=30), st.sampled_from(["a [MASK]", "a\nb", "{}", "[MASK] " * 30, "a" * 1500, "\ud800"])
)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
known = ["UPLOAD", "EXAMPLE", "FOLDER/secret.png", "FOLDER/pipe", "/etc/passwd", "/dev/zero", "UPLOAD/../x"]
paths = st.one_of(texts, st.sampled_from(known))
images = st.one_of(
    st.none(),
    st.fixed_dictionaries({"path": st.just("UPLOAD")}),
    st.fixed_dictionaries({"path": paths}, optional=dict.fromkeys(("meta", "url", "is_stream"), values)),
    values,
)
questions = st.fixed_dictionaries(
    {
        "data": st.one_of(st.lists(st.one_of(images, texts, values), max_size=5), values),
        "fn_index": st.one_of(st.integers(-1, 12), values),
    },
    optional=dict.fromkeys(("event_data", "trigger_id", "session_hash", "event_id", "batched"), values),
)
headers = st.dictionaries(
    st.sampled_from(["Host", "Origin", "Cookie", "Content-Type", "Content-Length", "Range", "X-Forwarded-Host",
                     "X-Forwarded-Proto", "Transfer-Encoding", "Expect", "Upgrade", "Connection", "If-None-Match"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40),
    max_size=3,
)  # fmt: skip
signs = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60)
routes = st.one_of(
    st.sampled_from(["/", "/config", f"{API}/queue/join", f"{API}/queue/data?session_hash=a", f"{API}/upload",
                     f"{API}/file=UPLOAD", f"{API}/info", f"{API}/heartbeat/a", "/static/x", "/assets/x"]),
    signs.map(lambda text: f"/{text}"),
    signs.map(lambda text: f"{API}/file={text}"),
)  # fmt: skip
names = st.text(st.characters(exclude_characters='"\r\n'), max_size=40)


class Fuzzer:
    """A page, a visitor, and what has been sent."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.visitor = Visitor(page.target.url)
        self.names = {
            "UPLOAD": json.loads(self.visitor.upload("x.png", png()).body)[0],
            "EXAMPLE": self.visitor.examples[0],
            "FOLDER": str(page.target.folder),
        }
        self.sent = 0
        self.lines = self.count_lines()

    def count_lines(self) -> int:
        """Lines that the page has written to its terminal."""
        return len(self.page.log.read_text("utf-8", "replace").splitlines())

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
        lines, self.lines = self.lines, self.count_lines()
        assert self.lines - lines <= 1, self.page.log.read_text("utf-8", "replace")[-2000:]
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
            done = [event for event in events if event["msg"] == "process_completed"]
            assert len(done) == 1, streamed.text[-300:]
            if not done[0]["success"]:
                said = str(done[0]["output"]["error"])
                assert said not in ("None", ""), streamed.text[-300:]
                assert not INNARDS.search(said), said[:300]


def fuzz(fuzzer: Fuzzer, examples: int, number: int) -> None:
    """Send about four times so many requests."""

    def join(body: bytes) -> None:
        fuzzer.check(fuzzer.visitor.join(body))

    def request(method: str, path: str, given_headers: dict[str, str], body: bytes) -> None:
        body = body if method in ("POST", "PUT") else b""
        fuzzer.check(fuzzer.visitor.request(method, fuzzer.fill_in(path), body, given_headers, 15))

    def upload(name: str, content: bytes) -> None:
        fuzzer.check(fuzzer.visitor.upload(name, content))

    methods = st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"])
    bodies = st.one_of(st.binary(max_size=200), values.map(lambda value: json.dumps(value).encode()))
    options = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        print_blob=False,
    )

    def fuzz_with(act: Callable[..., None], *made: st.SearchStrategy[Any]) -> None:
        @seed(number)
        @options
        @given(st.tuples(*made))
        def each(drawn: tuple[Any, ...]) -> None:
            act(*drawn)

        each()

    fuzz_with(fuzzer.ask, questions)
    fuzz_with(join, bodies)
    fuzz_with(request, methods, routes, headers, st.binary(max_size=100))
    fuzz_with(upload, names, st.binary(max_size=300))


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
            began, printed, first = time.monotonic(), 0.0, None
            for number in range(10**9):
                fuzz(fuzzer, 50, chosen.seed + number)
                assert fuzzer.visitor.ask("Search", ["a circle", None])[0], "the page does not answer any more"
                minutes, memory = (time.monotonic() - began) / 60, page.target.memory()
                if minutes - printed >= 1 or minutes >= chosen.minutes:
                    print(f"{minutes:.1f} minutes: {fuzzer.sent} requests, {memory:.0f} MB", flush=True)
                    printed, first = minutes, first or memory
                if minutes >= chosen.minutes:
                    break
            assert first is None or memory <= first * GROWTH, f"memory grew from {first:.0f} to {memory:.0f} MB"
        finally:
            page.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
