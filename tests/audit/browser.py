"""A headless Chromium, controlled through a pipe without further packages."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str:
  """Returns the path of an installed browser; skips the test if there is none."""
  path = next(filter(None, map(shutil.which, _NAMES)), None)
  if path is None:
    pytest.skip(f"no browser is installed: {', '.join(_NAMES)}")
  return path


class Tab:
  """A tab of the browser, with the events since the last `open` or `reload`."""

  def __init__(self, commands: Any, answers: Any):
    self._commands, self._answers = commands, answers
    self._number, self._session, self.events = 0, None, []

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """Sends one command of the DevTools protocol and returns its result."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    self._commands.write(json.dumps(message).encode() + b"\0")
    self._commands.flush()
    while True:
      answer = self._read()
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]
      self.events.append(answer)

  def _read(self) -> dict[str, Any]:
    content = bytearray()
    while (byte := self._answers.read(1)) != b"\0":
      assert byte, "the browser has ended"
      content += byte
    return json.loads(content)

  def open(self, path: pathlib.Path, width: int = 1280, height: int = 900) -> None:
    """Opens a file and waits until it is loaded."""
    if self._session is None:
      target = self.call("Target.createTarget", url="about:blank")["targetId"]
      attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
      self._session = attached["sessionId"]
      for domain in ("Page", "Network", "Runtime", "Log"):
        self.call(f"{domain}.enable")
    self.events.clear()
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )
    self.call("Page.navigate", url=path.as_uri())
    self._wait()

  def reload(self) -> None:
    """Loads the page again and waits until it is loaded."""
    self.events.clear()
    self.call("Page.reload")
    self._wait()

  def _wait(self) -> None:
    while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
      self.events.append(self._read())

  def run(self, script: str) -> Any:
    """Returns the value of a JavaScript expression, after waiting for promises."""
    result = self.call(
      "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
    )
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")

  def key(self, key: str) -> None:
    """Presses and releases a key."""
    text = {"text": key} if len(key) == 1 else {}
    self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
    self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

  def requests(self) -> list[str]:
    """URLs that the page requested, except local files and embedded data."""
    urls = [
      e["params"]["request"]["url"]
      for e in self.events
      if e.get("method") == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith(("file:", "data:", "about:"))]

  def errors(self) -> list[Any]:
    """Uncaught exceptions and logged errors."""
    return [
      e
      for e in self.events
      if e.get("method") == "Runtime.exceptionThrown"
      or (
        e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"
      )
    ]


@contextlib.contextmanager
def started(profile: pathlib.Path) -> Iterator[Tab]:
  """Starts a browser with the empty folder `profile`; the `with` block closes it."""
  commands_read, commands_write = os.pipe()
  answers_read, answers_write = os.pipe()
  redirected = f'exec "$0" "$@" 3<&{commands_read} 4>&{answers_write}'
  process = subprocess.Popen(
    [
      *("bash", "-c", redirected, find()),
      *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
      *("--no-first-run", f"--user-data-dir={profile}", "about:blank"),
    ],
    pass_fds=(commands_read, answers_write),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(commands_read)
  os.close(answers_write)
  try:
    with (
      open(commands_write, "wb") as commands,
      open(answers_read, "rb", buffering=1 << 16) as answers,
    ):
      tab = Tab(commands, answers)
      yield tab
      tab._session = None  # This command is for the browser, not for the tab.
      tab.call("Browser.close")
  finally:
    process.kill()
    process.wait()
