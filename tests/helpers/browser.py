"""A real browser for tests, driven by the standard protocol of WebDriver."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request

from processes import free_port

PROGRAMS = [shutil.which("chromedriver"), shutil.which("chromium")]
HAS_BROWSER = all(PROGRAMS)
KEY = "element-6066-11e4-a52e-4f735466cecf"
"""The name under which WebDriver gives the id of an element."""


class Browser:
    """A headless browser that records what its pages ask for and print."""

    def __init__(self, width=1200, height=1000, dark=False):
        port = free_port()
        self.process = subprocess.Popen(
            [PROGRAMS[0], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.base = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += [f"--window-size={width},{height}"]
        if dark:
            arguments.append("--force-dark-mode")
        options = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments, "binary": PROGRAMS[1]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        found = self._until_started({"capabilities": {"alwaysMatch": options}})
        self.base += f"/{found['sessionId']}"

    def _until_started(self, body):
        for _ in range(100):
            try:
                return self.call("POST", "", body)
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the driver does not answer")

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, url):
        self.call("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, text):
        """Send keys to the element that has the focus."""
        active = self.call("GET", "/element/active")[KEY]
        self.call("POST", f"/element/{active}/value", {"text": text})

    def device(self, **values):
        """Set width, height and dark mode, as a phone would have them."""
        size = {"width": values["width"], "height": values["height"]}
        size |= {"deviceScaleFactor": 1, "mobile": True}
        self.command("Emulation.setDeviceMetricsOverride", size)
        scheme = "dark" if values.get("dark") else "light"
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", {"features": [feature]})

    def command(self, name, values):
        self.call("POST", "/goog/cdp/execute", {"cmd": name, "params": values})

    def wait(self, script, seconds=30):
        """Wait until a script returns something true, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, script
            time.sleep(0.05)
        return found

    def logs(self, kind):
        return self.call("POST", "/se/log", {"type": kind})

    def requested(self):
        """Return the addresses that pages have asked for."""
        messages = [json.loads(one["message"])["message"] for one in self.logs("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()
