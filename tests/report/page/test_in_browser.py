"""The report in a real browser: it opens without a network, and what it shows is what the files hold.

Needs a Chromium (Debian: apt-get install chromium) and the package playwright; without one it is skipped.
"""

import re
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest

from docs.take_picture import launch
from tests.report.page.conftest import Report
from toptheta.report.plots.read import read_kept, read_results
from toptheta.report.results import DECODE, read_answers

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = launch(started)
        if browser is None:
            pytest.skip("no browser: apt-get install chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, report: Report) -> Iterator[Any]:
    """The report, drawn; no error and no request but for the file itself may come."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page, complaints, requests = context.new_page(), list[str](), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.path.as_uri())
    page.wait_for_selector("html[data-drawn=yes]")
    yield page
    assert not complaints and requests == [report.path.as_uri()]
    context.close()


def part_of(page: Any, task: str) -> Any:
    """The section of a task."""
    return page.locator("section.part").filter(has=page.locator("h2", has_text=task))


def column(part: Any, header: str) -> dict[str, str]:
    """A column of the result table, by cell."""
    headers = [text.strip() for text in part.locator("table.results thead th").all_inner_texts()]
    rows = part.locator("table.results tbody tr").all()
    return {
        row.locator("th").inner_text(): row.locator("th, td").nth(headers.index(header)).inner_text()
        for row in rows
    }


def test_the_tables_say_what_results_json_holds(page: Any, report: Report) -> None:
    shown = {"perplexity": ("KL to dense", "kl", 1, 4), "everyday_science": ("acc %", "acc", 100, 1)}
    shown["openai_humaneval"] = ("pass@1 %", "pass@1", 100, 1)
    for task, (header, name, factor, digits) in shown.items():
        found = column(part_of(page, task), header)
        results = report.of_task(task)
        assert found.keys() == results.keys()
        for cell, one in results.items():
            saved = read_results(Path(str(one.folder)))
            assert saved is not None
            metric = saved.metrics[name]
            numbers = [float(number) for number in re.findall(r"[-\d.e]+", found[cell])]
            assert numbers[0] == pytest.approx(factor * metric.value, abs=0.51 * 10**-digits)
            assert numbers[1] == pytest.approx(factor * metric.stderr, abs=0.51 * 10**-digits)


def test_a_click_on_a_heading_sorts(page: Any) -> None:
    part = part_of(page, "perplexity")
    heading = part.locator("thead button", has_text="KL to dense")
    for order in (-1, 1):
        heading.click()
        values = [float(text.split()[0]) for text in column(part, "KL to dense").values()]
        assert len(set(values)) > 3 and values == sorted(values, reverse=order < 0)


def tooltip(page: Any) -> dict[str, str]:
    rows = page.locator("#vg-tooltip-element.visible tr").all()
    return {row.locator("td.key").inner_text(): row.locator("td.value").inner_text() for row in rows}


def test_hovering_shows_the_cell(page: Any, report: Report) -> None:
    part = part_of(page, "perplexity")
    chart = part.locator("[id$=-tradeoff]")
    chart.locator("select[name=score]").select_option("KL to dense")
    chart.locator("select[name=against]").select_option("elements kept in decode")
    results = report.of_task("perplexity")
    points, seen = chart.locator(".mark-symbol.layer_2_marks path"), set()
    for i in range(points.count()):
        points.nth(i).hover(force=True)
        values = tooltip(page)
        one = results[values["cell"]]
        seen.add(one.method)
        assert float(values["KL to dense"]) == pytest.approx(one.metrics["kl"].value, rel=1e-3)
        share = one.kept_share("generative_decoding", "attn")
        assert share is not None
        x = float(values["elements kept in decode (% of dense attention)"])
        assert x == pytest.approx(100 * share, abs=6e-4)
    assert len(seen) >= 4


def test_a_click_in_the_heat_map_chooses_the_threshold(page: Any, report: Report) -> None:
    part = part_of(page, "openai_humaneval")
    kept, thresholds = part.locator("[id$=-kept]"), part.locator("[id$=-thresholds]")
    assert kept.locator("select[name=cell] option").all_inner_texts()[0].startswith("Top-theta")
    kept.locator("select[name=phase]").select_option("decode")
    mark = kept.locator(".mark-rect.marks path[aria-label*='layer: 1']").nth(2)
    mark.hover()
    values = tooltip(page)
    folder = Path(str(report.of_task("openai_humaneval")["Top-theta K=16"].folder))
    frame = read_kept(folder, int(values["layer"]), "attn", DECODE)
    assert frame is not None
    sums = frame[frame["head"] == int(values["head"])][["kept", "full"]].sum()
    assert float(values["kept (%)"]) == pytest.approx(100 * sums["kept"] / sums["full"], abs=0.006)
    mark.click()
    page.wait_for_timeout(200)
    for name in ("layer", "head"):
        chosen = thresholds.locator(f"select[name={name}] option:checked")
        assert chosen.inner_text() == f"{name} {values[name]}"


def test_answers_side_by_side(page: Any, report: Report) -> None:
    samples = part_of(page, "openai_humaneval").locator("article.samples")
    samples.locator("select[name=cell]").select_option("Top-theta K=16")
    results = report.of_task("openai_humaneval")
    by_cell = {cell: {a.key: a for a in read_answers(str(one.folder))} for cell, one in results.items()}
    keys = samples.locator("select[name=question] option").all_inner_texts()
    assert keys == list(by_cell["dense"])
    for i, key in enumerate(keys):
        dense, other = (str(by_cell[cell][key].answer) for cell in ("dense", "Top-theta K=16"))
        texts = samples.locator("pre.text").all_text_contents()
        assert texts == [dense, other]
        marks = samples.locator("mark").all_text_contents()
        place = len(commonprefix([dense, other]))
        assert marks == ([] if dense == other else [dense[place:], other[place:]])
        assert "not passed" in samples.locator(".answer").first.inner_text()
        if i + 1 < len(keys):
            samples.get_by_role("button", name="next").click()
    questions = part_of(page, "everyday_science").locator("article.samples")
    assert "Answer:" in questions.locator("pre.question").inner_text()
    assert (
        questions.locator("tbody tr").count() == 4
        and questions.locator(".badge", has_text="right").count() >= 1
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_widths_themes_and_print(browser: Any, report: Report, theme: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=theme)
    page = context.new_page()
    page.goto(report.path.as_uri())
    page.wait_for_selector("html[data-drawn=yes]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # only tables scroll sideways

    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert (brightness() > 128) == (theme == "light")
    page.click("#theme")
    assert (brightness() > 128) == (theme == "dark")
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    context.close()
