"""A headless Chromium, driven over a pipe by its DevTools protocol."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE = 60  # seconds, for a machine with other work


def path() -> str:
  """Returns where a Chromium is; skips the test where there is none."""
  given = os.environ.get("JAXTRANSFER_BROWSER")
  found = given or next(filter(None, map(shutil.which, _NAMES)), None)
  if not found:
    pytest.skip("no Chromium: install one or set JAXTRANSFER_BROWSER")
  return found


class Browser:
  """One page, and what a user does to it.

  Attributes:
    requests: every address that the page asked for.
    complaints: errors, refusals of its policy and warnings, as text.
  """

  def __init__(self, executable: str, profile: os.PathLike[str]):
    self.requests, self.complaints, self._loaded = [], [], False
    ours_out, ours_in = os.pipe(), os.pipe()
    # Beyond the numbers that they get over there.
    theirs = [
      fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (ours_out[0], ours_in[1])
    ]
    arguments = [
      executable,
      "--headless=new",
      "--remote-debugging-pipe",
      "--no-sandbox",
      "--no-first-run",
      "--disable-gpu",
      "--disable-dev-shm-usage",
      "--disable-background-networking",
      "--force-color-profile=srgb",
      "--hide-scrollbars",
      f"--user-data-dir={profile}",
      "about:blank",
    ]
    silent = os.open(os.devnull, os.O_RDWR)
    self._process = os.posix_spawn(
      executable,
      arguments,
      os.environ,
      file_actions=[
        *((os.POSIX_SPAWN_DUP2, silent, fd) for fd in (0, 1, 2)),
        (os.POSIX_SPAWN_DUP2, theirs[0], 3),
        (os.POSIX_SPAWN_DUP2, theirs[1], 4),
      ],
      setpgroup=0,
    )
    for fd in (silent, *theirs, ours_out[0], ours_in[1]):
      os.close(fd)
    self._out, self._in = ours_out[1], ours_in[0]
    self._text, self._number, self._session = b"", 0, None
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def close(self) -> None:
    with contextlib.suppress(OSError):
      os.killpg(self._process, signal.SIGKILL)
    os.waitpid(self._process, 0)
    os.close(self._out)
    os.close(self._in)

  def call(self, method: str, **parameters):
    """Returns what the browser answers to one command."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    data = memoryview(json.dumps(message).encode() + b"\0")
    while data:
      data = data[os.write(self._out, data) :]
    while True:
      answer = self._receive()
      if answer.get("id") == self._number:
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

  def _receive(self):
    end = time.monotonic() + _PATIENCE
    while b"\0" not in self._text:
      ready = select.select([self._in], [], [], end - time.monotonic())[0]
      assert ready, "the browser does not answer"
      data = os.read(self._in, 2**20)
      assert data, "the browser is gone"
      self._text += data
    line, _, self._text = self._text.partition(b"\0")
    message = json.loads(line)
    self._note(message.get("method"), message.get("params"))
    return message

  def _note(self, method, parameters):
    if method == "Page.loadEventFired":
      self._loaded = True
    elif method == "Network.requestWillBeSent":
      self.requests.append(parameters["request"]["url"])
    elif method == "Runtime.exceptionThrown":
      details = parameters["exceptionDetails"]
      self.complaints.append(json.dumps(details))
    elif method == "Log.entryAdded":
      # What the tests themselves do to see what is drawn.
      if "getImageData" not in parameters["entry"]["text"]:
        self.complaints.append(parameters["entry"]["text"])

  def size(self, width: int, height: int = 900, scale: float = 1) -> None:
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=scale,
      mobile=False,
    )

  def scripts(self, allowed: bool) -> None:
    self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

  def open(self, url: str) -> None:
    self._loaded = False
    self.call("Page.navigate", url=url)
    while not self._loaded:
      self._receive()

  def run(self, expression: str):
    """Returns the value of a JavaScript expression, awaited."""
    answer = self.call(
      "Runtime.evaluate",
      expression=expression,
      awaitPromise=True,
      returnByValue=True,
    )
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")

  def until(self, expression: str) -> None:
    """Waits for a JavaScript expression to be true."""
    end = time.monotonic() + _PATIENCE
    while not self.run(f"Boolean({expression})"):
      assert time.monotonic() < end, f"never {expression}: {self.complaints}"
      time.sleep(0.02)

  def settled(self) -> None:
    """Waits until what was changed has been painted."""
    frame = "requestAnimationFrame(() => requestAnimationFrame(done))"
    self.run(f"new Promise((done) => {frame})")

  def press(self, *keys: str) -> None:
    for key in keys:
      text = {"text": key} if len(key) == 1 else {}
      if key == "Enter":
        text = {"text": "\r"}
      for kind in ("keyDown", "keyUp"):
        code = _CODES.get(key, 0)
        self.call(
          "Input.dispatchKeyEvent",
          type=kind,
          key=key,
          windowsVirtualKeyCode=code,
          **(text if kind == "keyDown" else {}),
        )

  def point(self, x: float, y: float, *, click: bool = False) -> None:
    kinds = ["mouseMoved"]
    if click:
      kinds += ["mousePressed", "mouseReleased"]
    for kind in kinds:
      button = {} if kind == "mouseMoved" else {"button": "left"}
      self.call(
        "Input.dispatchMouseEvent",
        type=kind,
        x=x,
        y=y,
        clickCount=int(kind != "mouseMoved"),
        **button,
      )

  def screenshot(self, whole: bool = False) -> bytes:
    """Returns the page as PNG, or all that scrolling would show of it."""
    clip = {}
    if whole:
      size = self.call("Page.getLayoutMetrics")["cssContentSize"]
      clip = {"clip": {**size, "scale": 1}}
    answer = self.call(
      "Page.captureScreenshot", captureBeyondViewport=whole, **clip
    )
    return base64.b64decode(answer["data"])


_CODES = {
  "Tab": 9,
  "Enter": 13,
  "Escape": 27,
  " ": 32,
  "PageUp": 33,
  "PageDown": 34,
  "End": 35,
  "Home": 36,
  "ArrowLeft": 37,
  "ArrowUp": 38,
  "ArrowRight": 39,
  "ArrowDown": 40,
}
