"""The report page: what it holds, and how it behaves in a real browser, at two widths, light and dark, offline."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import small

from guided_descent.bench.compare import Arm, arms_for, compare
from guided_descent.bench.files import BenchError
from guided_descent.bench.report import render, write_report
from guided_descent.bench.scoring import Budget
from guided_descent.bench.store import OptimizerSpec

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
NASTY = 'sgd </script><img src=x onerror="alert(1)">'  # a label is free text and must stay text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A comparison with a clear order, a diverged arm and a label that tries to break the page."""
    out = tmp_path_factory.mktemp("report")
    arms, _ = arms_for([OptimizerSpec("adamw"), OptimizerSpec("nadamw")], small.REF, 40)
    arms.append(Arm(OptimizerSpec("sgd", {"lr": 1e-3}, NASTY), Budget()))
    arms.append(Arm(OptimizerSpec("sgd", {"lr": 1e30}, "wild"), Budget()))
    done = compare(
        small.REF, arms, seeds=(100, 101, 102), steps=40, out=out, workers=0, timing_rounds=1, build=small.build,
        command="guided-descent compare small:make --out runs/<mine>", notes=["a note with <b>markup</b>"],
    )  # fmt: skip
    write_report(done.document, out)
    return out


@pytest.fixture(scope="module")
def document(folder) -> dict:
    return json.loads((folder / "comparison.json").read_text())


def test_files_beside_the_page(folder):
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {"report.html", "comparison.json", "curves-step.png", "curves-time.png", "finals.png"}
    for png in folder.glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
        assert png.stat().st_size > 5000


def test_the_page_is_small_and_holds_plotly_once(folder):
    page = (folder / "report.html").read_text()
    assert (folder / "report.html").stat().st_size < 6e6
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    own = page.replace(page[page.index("/**") : page.index("</script>", page.index("/**"))], "")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", own)
    assert "Content-Security-Policy" in own


def test_the_page_says_everything_the_comparison_found(folder, document):
    page = (folder / "report.html").read_text().replace("\u00a0", " ")
    sentence = document["verdict"]["sentence"]
    assert escaped(sentence[1:]) in page
    assert escaped(document["command"]) in page
    assert escaped(document["notes"][0]) in page
    assert document["machine"]["processor"] in page
    assert document["versions"]["torch"] in page
    assert "preliminary" in page
    assert document["created"][:10] in page
    body = page[page.index('<table id="runs">') :]
    assert body[: body.index("</table>")].count("<tr>") == 1 + 12


def escaped(text: str) -> str:
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&#34;"), ("'", "&#39;")):
        text = text.replace(letter, entity)
    return text


def test_text_from_outside_stays_text(folder):
    page = (folder / "report.html").read_text()
    assert "<img" not in page
    assert "<b>markup" not in page
    data = page[page.index('id="data">') + 10 :]
    assert NASTY in [arm["label"] for arm in json.loads(data[: data.index("</script>")])["arms"]]


def test_the_data_in_the_page_are_the_runs(folder, document):
    page = (folder / "report.html").read_text()
    text = page[page.index('id="data">') + 10 :]
    data = json.loads(text[: text.index("</script>")])
    for shown, arm in zip(data["arms"], document["arms"], strict=True):
        for drawn, run in zip(shown["runs"], arm["runs"], strict=True):
            assert drawn["eval"]["step"] == run["eval"]["step"]
            assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(drawn["eval"]["value"], run["eval"]["value"]))


def test_no_winner_no_timing_and_one_seed_render_too(document):
    plain = json.loads(json.dumps(document))
    plain["verdict"].update(winner=None, sentence="No winner is named: 1 common seed, at least 3 are needed.")
    plain["seeds"], plain["target"]["value"], plain["command"], plain["load"] = [100], None, "", None
    for arm in plain["arms"]:
        arm["runs"] = arm["runs"][:1]
        arm["row"].update(
            dict.fromkeys(("step_ms", "optimizer_ms", "optimizer_share", "time_to_target", "steps_to_target"))
        )
        arm["row"].update(final_sd=None, update_rms=None)
    page = render(plain)
    assert "No winner is named" in page
    assert "not timed" in page


def test_the_report_cannot_be_written_where_a_file_is_in_the_way(document, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="file"):
        write_report(document, tmp_path / "file")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


class Visit:
    """A page that was opened and watched."""

    def __init__(self, browser, path: Path, width: int, scheme: str) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 850}, color_scheme=scheme, has_touch=width < 500
        )
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('#curves .scatterlayer .trace').length > 0")

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def traces(self, plot: str = "curves") -> list[dict]:
        script = (
            f"document.getElementById('{plot}').data.map(t => ({{name: t.name, x: t.x, y: t.y, visible: t.visible}}))"
        )
        return self.page.evaluate(script)

    def axis(self, name: str, key: str) -> object:
        return self.page.evaluate(f"document.getElementById('curves')._fullLayout.{name}.{key}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(browser, folder, document, width, scheme):
    visit = Visit(browser, folder / "report.html", width, scheme)
    page = visit.page
    assert visit.fits()

    names = [trace["name"] for trace in visit.traces()]
    for arm in document["arms"]:
        for run in arm["runs"]:
            assert f"{arm['label']}, seed {run['seed']}" in names
    drawn = page.evaluate("document.querySelectorAll('#curves .scatterlayer .trace').length")
    assert drawn >= 9  # the diverged arm has no second point to draw a line to
    for plot in ("finals", "forest", "costs"):
        assert page.evaluate(f"document.querySelectorAll('#{plot} .trace').length") > 0

    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 200
    assert dark == (scheme == "dark")
    page.click("#theme")
    changed = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert changed != background
    page.click("#theme")

    page.click("[data-value=time]")
    by_time = visit.traces()[0]
    cost = document["arms"][0]["row"]["step_ms"]
    assert by_time["x"][-1] == pytest.approx(40 * cost / 1000, rel=1e-4)
    page.click("[data-value=train]")
    assert len(visit.traces()[0]["x"]) == 40
    page.click("[data-value=step]")
    page.click("[data-flip=logx]")
    page.click("[data-flip=logy]")
    assert (visit.axis("xaxis", "type"), visit.axis("yaxis", "type")) == ("log", "log")
    page.click("[data-flip=late]")
    assert visit.axis("xaxis", "autorange") is True

    page.click("#legend button >> nth=0")
    assert visit.traces()[0]["visible"] is False
    page.click("#legend button >> nth=0")
    assert visit.traces()[0]["visible"] is True

    for summary in page.query_selector_all("summary"):
        summary.click()
    assert visit.fits()
    assert page.locator("#runs tbody tr").count() == 12

    assert visit.problems == []
    assert [url for url in visit.requests if not url.startswith(("file://", "data:", "blob:"))] == []
    assert len([url for url in visit.requests if url.startswith("file://")]) == 1
    visit.context.close()


def test_hovering_names_the_run(browser, folder):
    visit = Visit(browser, folder / "report.html", 1440, "light")
    frame = visit.page.locator("#curves .nsewdrag").first
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    shown = ""
    for part in range(1, 20):
        visit.page.mouse.move(box["x"] + box["width"] * 0.98, box["y"] + box["height"] * part / 20)
        visit.page.wait_for_timeout(60)
        shown += visit.page.locator("#curves .hoverlayer").text_content()
    assert "seed" in shown or "mean of" in shown
    assert "step" in shown
    visit.context.close()
