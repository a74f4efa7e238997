"""JupyterLab on loopback and a Chromium that uses it: what the browser tests stand on."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {  # a first start asks no questions
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "apputils-extension/themes": '{"theme": "JupyterLab Light"}',
}
PROMPTS = ".jp-CodeCell .jp-InputPrompt"
PATIENCE = 180_000  # milliseconds until a condition has come true; a machine may have other work
BROWSERS = "chromium", "chromium-browser", "google-chrome"


@contextlib.contextmanager
def chromium():
    "A browser: one on the PATH, or the one that `playwright install chromium` left. Skips where there is none."
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: make browser installs it")
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not Path(found).exists():
            pytest.skip(f"no browser here ({', '.join(BROWSERS)}): make browser installs one")
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Lab:
    "A running JupyterLab: `url`, and `folder`, in which the copies of notebooks lie."

    def __init__(self, folder: Path):
        self.folder, self.token = folder, secrets.token_hex(16)
        settings = folder / ".settings" / "@jupyterlab"
        for name, text in SETTINGS.items():
            path = settings / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | dict(
            JUPYTERLAB_SETTINGS_DIR=str(folder / ".settings"), JUPYTERLAB_WORKSPACES_DIR=str(folder / ".workspaces"),
            IPYTHONDIR=str(folder / ".ipython"), PYTHONPATH=str(ROOT), JUPYTER_PREFER_ENV_PATH="1")
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={folder}"]
        with open(folder / "lab.log", "wb") as log:
            self.server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)

    def wait(self, seconds: float = PATIENCE / 1000) -> "Lab":
        "Itself, once it answers."
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.server.poll() is None:
            with contextlib.suppress(OSError), urlopen(f"{self.url}/api?token={self.token}"):
                return self
            time.sleep(0.5)
        pytest.fail(f"JupyterLab does not answer:\n{(self.folder / 'lab.log').read_text()[-3000:]}")

    def close(self):
        self.server.terminate()
        self.server.wait(PATIENCE / 1000)

    def copy(self, name: str, **parameters) -> str:
        "A notebook of `nbs/` under its own name, with other values of some parameters."
        import nbformat
        notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
        for key, value in parameters.items():
            lines = cell.source.splitlines()
            place = next(i for i, line in enumerate(lines) if line.startswith(f"{key} = "))
            lines[place] = f"{key} = {value!r}"
            cell.source = "\n".join(lines)
        for c in notebook.cells:  # what is seen is made now
            if c.cell_type == "code": c.update(outputs=[], execution_count=None)
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        return f"{self.url}/lab/tree/{name}.ipynb?token={self.token}&reset"


class Notebook:
    "A notebook in JupyterLab, as a person has it before them."

    def __init__(self, page, url: str):
        self.page = page
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.get_by_text("| Idle").wait_for()  # the status line, once the kernel is there

    def run_all(self, seconds: float = 300) -> None:
        "Run > Run All Cells; until nothing runs any more."
        self.start_all()
        self.finish(seconds)

    def start_all(self) -> None:
        "Run > Run All Cells. JupyterLab forgets what is asked before it holds its kernel: then it is asked again."
        from playwright.sync_api import TimeoutError
        prompts = "p => [...document.querySelectorAll(p)].map(e => e.textContent).join()"
        before = self.page.evaluate(prompts, PROMPTS)
        for _ in range(3):
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            with contextlib.suppress(TimeoutError):
                self.page.wait_for_function(f"([p, was]) => ({prompts})(p) != was", arg=[PROMPTS, before],
                    timeout=PATIENCE / 3)
                return
        pytest.fail("no cell was run")

    def interrupt(self) -> None:
        "Kernel > Interrupt Kernel, as the toolbar's stop button."
        self.page.get_by_role("menuitem", name="Kernel", exact=True).click()
        self.page.get_by_role("menuitem", name="Interrupt Kernel").click()

    def finish(self, seconds: float = 300) -> None:
        "Wait until no cell is waiting or at work. Fails where one ended in an error."
        self.page.wait_for_function(
            "p => ![...document.querySelectorAll(p)].some(e => e.textContent.includes('*'))", arg=PROMPTS,
            timeout=seconds * 1000)
        errors = self.page.locator(".jp-OutputArea-output", has_text="Traceback (most recent").all_inner_texts()
        assert not errors, errors[0][-2000:]
