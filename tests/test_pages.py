"""Pages: the report of a folder, parsed; in a real browser, where there is one, both of them."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

import calvin
import pages

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """A run's folder with a stage's log, its picture, and an evaluation below it."""
    rows = [{"step": n, "kind": kind, "hours": n / 100, "loss": 9 / n, "kl": 2, "critic_r2": 0.5}
            for n in range(1, 9) for kind in ("train", "validate")]  # fmt: skip
    half_written = '{"step": 9, "ki'
    (tmp_path / "wm.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + half_written)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "evaluation").mkdir()
    dot = np.zeros((64, 64, 3), np.uint8)
    imageio.imwrite(tmp_path / "pictures/prediction_0000008.png", dot)
    for film in ("evaluation/chain_0007.gif", "pull_it_out_0.gif"):
        imageio.imwrite(tmp_path / film, dot[None])
    result = {"env": "sim", "label": "<b>ours</b>", "checkpoint": "agent.pt", "seed": 3}
    result |= {"evaluation_seed": 0, "commit": "abc", "chains": 4, "avg_len": 1.25}
    result |= {"success": [0.75, 0.5, 0, 0, 0], "tasks": {"open_drawer": [3, 4]}}
    result |= {"sentences": {"open_drawer": "open it", "turn_on_led": "press it"}}
    (tmp_path / "evaluation/results.json").write_text(json.dumps(result))
    chain = {"chain": 7, "solved": 1, "tasks": ["open_drawer", "turn_on_led"], "steps": [9, 360]}
    log = json.dumps({"env": "sim"}) + "\n" + json.dumps(chain) + "\n"
    (tmp_path / "evaluation/chains.jsonl").write_text(log)
    pages.report(tmp_path, "wm", {"steps": 16, "seed": 5, "data": "<script>alert(1)</script>"})
    return tmp_path


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [x for k, x in attributes if k in ("src", "href", "xlink:href", "srcset")]


def test_a_report_shows_all_that_the_folder_holds(run, capsys):
    text = (run / "report.html").read_text()
    page = Links(text)
    assert page.tags.count("svg") == 3  # loss, KL, the critic's R²
    assert {"pictures/prediction_0000008.png", "evaluation/chain_0007.gif"} <= {*page.links}
    shown = ["Step 8 of 16", "Avg. Len. 1.25", "75 %", "open drawer", "open it", "press it"]
    shown += ["pull it out 0", str(pages.commit()), pages.machine()]
    assert [x for x in shown if x not in text] == []
    assert 'http-equiv="refresh"' in text  # it is not finished
    assert capsys.readouterr().err == ""


def test_a_report_needs_no_network_and_escapes_what_it_shows(run):
    text = (run / "report.html").read_text()
    page = Links(text)
    elsewhere = {
        x for x in page.links if not x.startswith(("#", "data:")) and not (run / x).exists()
    }
    assert elsewhere == {"evaluation/report.html"} and "url(http" not in text
    assert "script" not in page.tags and "&lt;script&gt;" in text and "&lt;b&gt;ours" in text


def test_a_report_that_fails_says_so_and_breaks_nothing(run, capsys):
    (run / "evaluation/results.json").write_text("{}")
    pages.report(run, "wm", {})
    assert "report.html was not written: KeyError" in capsys.readouterr().err


def test_seconds_of_calls_add_up_and_the_report_above_is_written_anew(run):
    (run / "report.html").write_text("old")
    for _ in range(2):
        pages.report(run / "evaluation", "evaluation", {"chains": 4}, seconds=30.0)
    about = json.loads((run / "evaluation/settings.json").read_text())["evaluation"]
    assert about["seconds"] == 60 and about["settings"] == {"chains": 4}
    assert "Avg. Len. 1.25" in (run / "report.html").read_text()


@pytest.mark.parametrize(("ok", "n", "low", "high"), [(0, 10, 0, 0.278), (8, 10, 0.490, 0.943)])
def test_intervals_are_wilsons(ok, n, low, high):
    assert pages.wilson(ok, n) == pytest.approx((low, high), abs=1e-3)


# ------------------------------------------------------------------ in a browser
class Browser:
    """Chromium without a window, by its debugging protocol over two pipes."""

    def __init__(self, folder):
        theirs, self.commands = os.pipe()
        self.answers, also_theirs = os.pipe()
        flags = f"--headless=new --no-sandbox --disable-gpu --user-data-dir={folder}/chromium"
        pipes = f"--remote-debugging-pipe 3<&{theirs} 4>&{also_theirs} 2>/dev/null"
        command = ["bash", "-c", f"exec {CHROMIUM} {flags} {pipes}"]
        self.process = subprocess.Popen(command, pass_fds=(theirs, also_theirs))
        self.session, self.n, self.rest = {}, 0, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **parameters) -> dict:
        self.n += 1
        message = {"id": self.n, "method": method, "params": parameters} | self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.answers, 1 << 16)
            one, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self.n:
                return answer["result"]

    def js(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")

    def until(self, expression: str, seconds: float = 120):
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"{expression}: {self.js('document.body.innerText')}"
            time.sleep(0.2)

    def open(self, url: str, width: int, scheme: str):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=media)
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete' && location.href != 'about:blank'")

    def fits(self) -> bool:
        return self.js("document.documentElement.scrollWidth <= innerWidth")

    def contrast(self, selector: str) -> float:
        """WCAG's contrast of an element's text with the page."""
        colours = [self.js(f"getComputedStyle(document.querySelector('{x}')).{k}")
                   for x, k in ((selector, "color"), ("body", "backgroundColor"))]  # fmt: skip
        rgb = np.array([[int(n) for n in re.findall(r"\d+", c)[:3]] for c in colours]) / 255
        dark, light = sorted(rgb**2.2 @ [0.2126, 0.7152, 0.0722])
        return (light + 0.05) / (dark + 0.05)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    it = Browser(tmp_path_factory.mktemp("browser"))
    yield it
    it.close()


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_fits_and_is_readable_light_and_dark(chromium, run, width, scheme):
    chromium.open((run / "report.html").as_uri(), width, scheme)
    assert chromium.fits()
    assert min(chromium.contrast(x) for x in ("h1", ".dim", "svg text, svg use")) > 4.5
    assert chromium.js("[...document.images].every(x => x.loading == 'lazy' || x.naturalWidth)")


@browser
def test_an_instruction_typed_into_the_live_page_opens_the_drawer(chromium, tmp_path):
    closed = next(n for n in range(1000) if calvin.chain(n)[0].drawer == "closed")
    command = [sys.executable, ROOT / "evaluate.py", "--live", "--policy", "operator"]
    server = subprocess.Popen([*command, "--first", str(closed)], stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
        chromium.open(url, 390, "dark")
        chromium.until("document.body.className == 'ready'")
        assert chromium.fits() and chromium.contrast("h1") > 4.5
        suggested = chromium.js("document.querySelectorAll('datalist option').length")
        assert suggested == len(calvin.TASKS)

        def tell(sentence):
            chromium.js(f"document.querySelector('input').value = '{sentence}'")
            chromium.js("document.querySelector('form').requestSubmit()")

        tell("fetch me a coffee")
        chromium.until("document.body.className == 'refused'")
        assert "is not known. The nearest:" in chromium.js("document.body.innerText")
        for task in ("turn_on_led", "open_drawer"):  # the second interrupts the first
            sentence = calvin.sentences()[task][0]
            tell(sentence)
            chromium.until(f"document.getElementById('told').innerText.includes('{sentence}')")
        chromium.until("document.body.className == 'done'")
        assert chromium.js("document.getElementById('static').naturalWidth") == 64
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
    finally:
        server.kill()
