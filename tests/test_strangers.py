"""Peers that are none of ZeroMQ 3: web pages, older protocols, other programs. None of them is served.

Owns:    what a listening socket does with bytes that are not ZMTP 3; real programs send some of them.
Runs in: the test process; curl, node and a browser are processes of their own, where a machine has them.
Unaware: of what requests mean, but for one that would create a file.
"""
from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Iterator

import pytest
from support import DEADLINE_SECS, Server, wait_until

zmq = pytest.importorskip("zmq")

BROWSER = (("Host", "127.0.0.1"), ("Connection", "keep-alive"), ("Sec-Fetch-Site", "cross-site"),
           ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0"),
           ("Origin", "http://page.example"), ("Referer", "http://page.example/"))
SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
REQ = 3


def spawn(done: Path) -> bytes:
    """Return a request that would create a file."""
    request = json.dumps({"type": "spawn_request", "request_id": "page",
                          "config": {"command": ["touch", str(done)]}}, separators=(",", ":")).encode()
    assert len(request) < 254
    return request


def old_frames(request: bytes) -> bytes:
    """Return a request as a REQ peer of ZMTP 1.0 sends it: length and flags before each frame."""
    return b"\1\1" + bytes([len(request) + 1]) + b"\0" + request


def body_of_a_page(request: bytes) -> bytes:
    """Return what a page posts: somewhere in it a frame of ZMTP 1.0 ends, wherever the first ones began."""
    hidden = b"\1\1" + bytes([len(request) + 1]) + b"\2" + request
    return b"".join(b"\2" * (600 + n) + hidden for n in range(3)) + b"\2" * 300


def post(path: str, body: bytes) -> bytes:
    """Return a POST as a browser sends it."""
    head = "".join(f"{name}: {value}\r\n" for name, value in (*BROWSER, ("Content-Length", str(len(body)))))
    return f"POST /{path} HTTP/1.1\r\n{head}\r\n".encode() + body


#: what peers say that do not speak ZMTP 3; `%` stands for a request
STRANGERS = {
    "ZMTP 1.0": b"\1\0%1",
    "ZMTP 1.0, long": b"\xff" + struct.pack("!Q", 1) + b"\0%1",
    "ZMTP 2.0": SIGNATURE + bytes([1, REQ]) + b"\0\0" + b"\1\0%2",
    "ZMTP 2.0, DEALER": SIGNATURE + bytes([1, 5]) + b"\0\0" + b"\1\0%2",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"r" * 600,
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n" + b"k" * 600,
    "Redis": b"*1\r\n$4\r\nPING\r\n" + b"p" * 300,
}


def said_until_cut_off(endpoint: str, said: bytes) -> bytes:
    """Say something; return what was answered until the server cut the connection, which it has to."""
    host, _, port = endpoint.partition("://")[2].rpartition(":")
    heard = b""
    with socket.create_connection((host, int(port)), DEADLINE_SECS) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(said)
            while piece := sock.recv(65536):
                heard += piece
    return heard


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


@pytest.fixture
def ends(shared: Server) -> tuple[str, str]:
    """Both sockets that listen."""
    return shared.endpoint, shared.pub_endpoint


def assert_honest_served(server: Server) -> None:
    """Requests are answered, subscribers are told."""
    with zmq.Context() as context, context.socket(zmq.REQ) as req, context.socket(zmq.SUB) as sub:
        for sock in (req, sub):
            sock.linger, sock.rcvtimeo = 0, int(DEADLINE_SECS * 1000)
        req.connect(server.endpoint)
        req.send(b'{"type":"health_check_request","request_id":"h"}')
        assert json.loads(req.recv())["success"]
        sub.connect(server.pub_endpoint)
        sub.subscribe(b"server")
        assert json.loads(sub.recv_multipart()[1])["type"] == "server_update"


@pytest.mark.parametrize("stranger", STRANGERS)
def test_only_zmtp_3_is_served(stranger: str, shared: Server, ends: tuple[str, str], state_dir: Path) -> None:
    request = spawn(state_dir / "done")
    said = STRANGERS[stranger].replace(b"%1", old_frames(request))
    said = said.replace(b"%2", b"\1\0" + b"\0" + bytes([len(request)]) + request)
    for endpoint in ends:
        assert b"spawn_response" not in said_until_cut_off(endpoint, said)
    assert not (state_dir / "done").exists()
    assert_honest_served(shared)


def test_a_page_that_posts_runs_nothing(shared: Server, ends: tuple[str, str], state_dir: Path) -> None:
    """The bytes of HTTP are frames of ZMTP 1.0, too; how long the first one is depends on the path."""
    body = body_of_a_page(spawn(state_dir / "done"))
    for endpoint in ends:
        for length in range(40):
            assert b"spawn_response" not in said_until_cut_off(endpoint, post("a" * length, body))
    assert not (state_dir / "done").exists() and not shared.ask({"type": "list_agents_request", "all": True})["total"]
    assert_honest_served(shared)


def test_a_peer_says_nothing_about_itself_that_is_believed(shared: Server) -> None:
    """A property of the handshake is what a peer wants it to be; it harms nobody."""
    with zmq.Context() as context, context.socket(zmq.REQ) as req:
        req.linger, req.rcvtimeo = 0, int(DEADLINE_SECS * 1000)
        req.setsockopt(zmq.METADATA, b"X-User-Id:root")
        req.connect(shared.endpoint)
        req.send(b'{"type":"health_check_request","request_id":"h"}')
        assert json.loads(req.recv())["success"]


# ---------------------------------------------------------------- real programs

def program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"{' or '.join(names)} is not installed")  # type: ignore[return-value]


def test_curl_runs_nothing(ends: tuple[str, str], shared: Server, state_dir: Path) -> None:
    curl, body = program("curl"), state_dir / "body"
    body.write_bytes(body_of_a_page(spawn(state_dir / "done")))
    for endpoint in ends:
        for length in range(0, 40, 4):
            done = subprocess.run([curl, "--silent", "--noproxy", "*", "--max-time", "20", "--data-binary",
                                   f"@{body}", f"http://127.0.0.1:{port_of(endpoint)}/{'a' * length}"],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert done.returncode not in (0, 28) and b"spawn_response" not in done.stdout, "it is cut off, soon"
    assert not (state_dir / "done").exists()
    assert_honest_served(shared)


FETCH = """
const body = Buffer.from(process.argv[1], "base64");
for (const port of process.argv.slice(2))
  for (let length = 0; length < 40; length++)
    await fetch(`http://127.0.0.1:${port}/${"a".repeat(length)}`, {method: "POST", body}).catch(() => 0);
console.log("done");
"""


def test_node_fetches_nothing(ends: tuple[str, str], shared: Server, state_dir: Path) -> None:
    import base64
    body = base64.b64encode(body_of_a_page(spawn(state_dir / "done"))).decode()
    done = subprocess.run([program("node"), "--input-type=module", "-e", FETCH, "--", body,
                           *(str(port_of(endpoint)) for endpoint in ends)],
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    if b"fetch is not defined" in done.stderr:
        pytest.skip("this node has no fetch")
    assert done.stdout.strip() == b"done", done.stderr
    assert not (state_dir / "done").exists()
    assert_honest_served(shared)


PAGE = """<script>
const body = new Uint8Array(%s), ports = %s;
const posts = ports.flatMap(port => [...Array(40).keys()].map(length => fetch(
    `http://127.0.0.1:${port}/${"a".repeat(length)}`, {method: "POST", mode: "no-cors", body}).catch(() => 0)));
Promise.race([Promise.all(posts), new Promise(done => setTimeout(done, 20000))]).then(() => fetch("/done"));
</script>"""


@contextlib.contextmanager
def page(text: str) -> Iterator[tuple[str, threading.Event]]:
    """Serve a page; give its address, and what is set when it has done all."""
    done = threading.Event()

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/done":
                done.set()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_port}/", done
        site.shutdown()


def test_a_real_browser_runs_nothing(ends: tuple[str, str], shared: Server, state_dir: Path) -> None:
    chromium = program("chromium", "chromium-browser", "google-chrome")
    body = list(body_of_a_page(spawn(state_dir / "done")))
    with page(PAGE % (body, [port_of(endpoint) for endpoint in ends])) as (address, done):
        browser = subprocess.Popen(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
             "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
             f"--user-data-dir={state_dir / 'profile'}", "--remote-debugging-port=0", address],
            env={**os.environ, "HOME": str(state_dir)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_until(lambda: done.is_set() or browser.poll() is not None, what="the page to have posted all")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    if not done.is_set():
        pytest.skip(f"{chromium} does not run here")
    assert not (state_dir / "done").exists()
    assert_honest_served(shared)
