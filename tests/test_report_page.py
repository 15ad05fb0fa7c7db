"""The HTML report in a real browser: nothing is loaded, nothing is cut, everything can be read."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import bench, evaluation, tasks, verification
from test_proof import TOLD, engine
from test_report import hostile, report_of  # noqa: F401 - hostile is a fixture

from pifa_deploy.report_html import html_page

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SIZES = {"phone": 390, "desktop": 1280}

# Smallest contrast of all visible text to what lies behind it (WCAG 2.2, 1.4.3), with the text.
CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, share, under) => top.slice(0, 3).map((v, i) => v * share + under[i] * (1 - share));
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const color = rgb(getComputedStyle(each).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("title, desc")) continue;
    const drawn = element instanceof SVGElement, style = getComputedStyle(element);
    let ground = behind(element);
    if (element.parentElement.classList.contains("cells")) {
      const cell = element.previousElementSibling, shade = getComputedStyle(cell);
      ground = over(rgb(shade.fill), Number(shade.fillOpacity), ground);
    }
    const [a, b] = [light(rgb(drawn ? style.fill : style.color)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.textContent];
  }
  return worst;
}"""

# Smallest contrast of all marks of plots to the page (1.4.11).
MARKS = (
    CONTRAST.replace(
        'document.querySelectorAll("body *")',
        'document.querySelectorAll(".plot .mark, .plot .bound, .plot .reference")',
    )
    .replace("if (!own || ", "if (")
    .replace("style.fill : ", "(element.tagName === 'line' ? style.stroke : style.fill) : ")
)

# Texts of drawings that leave their drawing, or that cover another text.
COLLISIONS = """() => {
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {
    if (!plot.checkVisibility()) continue;
    const frame = plot.getBoundingClientRect();
    const boxes = [...plot.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([name, box], i) => {
      const across = box.left < frame.left - 2 || box.right > frame.right + 2;
      if (across || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
        found.push(`${name} leaves its drawing`);
      for (const [other, its] of boxes.slice(0, i)) {
        const wide = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const high = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (wide > 1 && high > 3) found.push(`${name} covers ${other}`);
      }
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "engine").mkdir()
    sparse = engine(folder / "engine", TOLD, sparse_weights=True)
    report = report_of(
        folder, bench=bench(), evaluate=evaluation(), verify=verification(passed=False), tasks=tasks(), sparse=sparse
    )
    (folder / "report.html").write_text(html_page(report), encoding="utf-8")
    return folder / "report.html"


class Opened:
    """A page with what the browser said of it."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.stopped: list[tuple[str, str]] = []
        self.page.on("requestfailed", lambda request: self.stopped.append((request.url, request.failure)))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_can_be_read(browser: Any, page_file: Path, size: str, scheme: str) -> None:
    with Opened(browser, page_file, SIZES[size], scheme) as opened:
        page = opened.page
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert opened.said == []
        assert opened.asked == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]
        boxes = [plot.bounding_box() for plot in page.query_selector_all("svg.plot")]
        # Scatter plots of two texts, three cases, a map of errors, one of times in each of two cases.
        assert len(boxes) == 2 * 3 + 3 + 1 + 2
        assert all(box and box["width"] > 250 and box["height"] > 80 for box in boxes)
        assert page.evaluate(COLLISIONS) == []
        ratio, text = page.evaluate(CONTRAST)
        assert ratio >= 4.5, text
        assert page.evaluate(MARKS)[0] >= 3
        paper = sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")))
        assert (paper < 150) == (scheme == "dark")


def test_wide_tables_scroll_inside_their_box_on_a_phone(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, SIZES["phone"], "light") as opened:
        wide = opened.page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 50).length"
        )
        reachable = opened.page.evaluate("[...document.querySelectorAll('.scroll')].every(box => box.tabIndex === 0)")
        smallest = opened.page.evaluate(
            "Math.min(...[...document.querySelectorAll('.plot text')].map(text => text.getBoundingClientRect().height))"
        )
        assert wide >= 3
        assert reachable
        assert smallest >= 10


def test_plots_have_names_and_the_page_an_outline(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, SIZES["desktop"], "light") as opened:
        titles = opened.page.evaluate("[...document.querySelectorAll('svg[role=img] > title')].map(e => e.textContent)")
        assert len(titles) == 12
        assert all(titles)
        levels = opened.page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_policy_of_the_page_stops_requests(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, SIZES["desktop"], "light") as opened:
        # The browser tells of it to the page and to its debugger, whichever first.
        with opened.page.expect_event("requestfailed"):
            stopped = opened.page.evaluate(
                """() => new Promise(done => {
                    document.addEventListener("securitypolicyviolation", event => done(event.effectiveDirective));
                    setTimeout(() => done("nothing was stopped"), 2000);
                    new Image().src = "http://127.0.0.1:9/x.png";
                })"""
            )
        assert stopped == "img-src"
        assert opened.stopped == [("http://127.0.0.1:9/x.png", "csp")]


def test_hostile_names_are_shown_and_not_run(browser: Any, hostile: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "report.html").write_text(html_page(hostile), encoding="utf-8")
    with Opened(browser, tmp_path / "report.html", SIZES["phone"], "light") as opened:
        assert opened.said == []
        assert opened.page.evaluate("document.scripts.length") == 0
        assert '<script>alert("x")</script>' in opened.page.inner_text("h1")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"]
