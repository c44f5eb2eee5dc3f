"""A headless Chromium, steered through its own protocol: real taps and keys, any width, paper, dark mode."""

from __future__ import annotations

import base64
import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket  # the package websocket-client, which jupyterlab brings along

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
    "--remote-allow-origins=* --remote-debugging-port=0"
).split()


def path() -> str | None:
    """Of $ICLGD_BROWSER, or else of a Chromium that is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("ICLGD_BROWSER") or next(filter(None, map(shutil.which, names)), None)


class Page:
    """One tab. As a context manager it starts the browser and ends it; `profile` is a folder that it may fill."""

    def __init__(self, profile: Path, limit: float = 60) -> None:
        self.profile, self.limit, self.numbers = profile, limit, itertools.count(1)

    def __enter__(self) -> Page:
        command = [path() or "chromium", *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        place = self.profile / "DevToolsActivePort"
        until = time.monotonic() + self.limit
        while not (place.is_file() and place.read_text().count("\n")):
            assert self.process.poll() is None and time.monotonic() < until, "the browser did not start"
            time.sleep(0.05)
        port, address = place.read_text().split()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{address}", timeout=self.limit)
        self.session = {}
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """What the browser answers to a command of the DevTools protocol."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": arguments} | self.session))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def before(self, script: str) -> str:
        """Run `script` in every page from now on, before any of its own; returns its name, for `forget`."""
        return str(self.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"])

    def forget(self, name: str) -> None:
        """Run a script of `before` no longer."""
        self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=name)

    @contextmanager
    def printing(self, width: int) -> Iterator[None]:
        """The page is laid out as for paper of this width meanwhile."""
        self.call("Emulation.setEmulatedMedia", media="print")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self.settle()
        yield
        self.call("Emulation.setEmulatedMedia", media="")

    def settle(self) -> None:
        """Wait until what moves has moved."""
        self.run("new Promise(done => setTimeout(() => requestAnimationFrame(done), 500))")

    def window(self, width: int, height: int = 900) -> None:
        """What shows gets this size; narrow ones are phones, which are touched."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=width < 600)

    def open(self, address: str, width: int = 1440, height: int = 900, theme: str = "light") -> None:
        """Show a page in a window of this size, and wait until fonts and mathematics are there."""
        self.window(width, height)
        name = self.before(f"for (const key of ['mode', 'theme']) localStorage.setItem(key, '{theme}')")
        self.call("Page.navigate", url=address)
        self.run(
            """(async () => {
            if (document.readyState != "complete") await new Promise(done => addEventListener("load", done));
            if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
            await document.fonts.ready;
        })()"""
        )
        self.forget(name)

    def click(self, selector: str) -> None:
        """Press and release the mouse over the middle of the first element of this kind that shows."""
        x, y = self.run(
            f"""(() => {{
            const shown = [...document.querySelectorAll({json.dumps(selector)})].filter(e => e.checkVisibility());
            const box = shown[0].getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        """Press and release a key (`Tab`, `Enter`, ...)."""
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "Enter": 13, "Escape": 27}[name]
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **text)

    def picture(self, whole: bool = False) -> bytes:
        """PNG of what shows, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def paper(self, **options: Any) -> bytes:
        """PDF of the page as it is printed on A4; options as those of Page.printToPDF."""
        options = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True} | options
        stream = self.call("Page.printToPDF", transferMode="ReturnAsStream", **options)["stream"]
        parts = []
        while True:
            part = self.call("IO.read", handle=stream, size=2**20)
            parts.append(base64.b64decode(part["data"]) if part.get("base64Encoded") else part["data"].encode())
            if part["eof"]:
                self.call("IO.close", handle=stream)
                return b"".join(parts)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder quietly, at `address`."""

    def __init__(self, folder: Path) -> None:
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
