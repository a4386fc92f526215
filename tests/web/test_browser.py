"""The web page in a browser: headless Chromium, with the few-step miniature."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openpulid.web import page as web
from openpulid.web.server import launch_options
from openpulid.world.gallery import render_portrait
from tests.web.test_page import free_port

pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install the package chromium or google-chrome"
)
FOCUSED = """(() => {
  const element = document.activeElement;
  return element.innerText || element.getAttribute("aria-label")
    || element.closest("label")?.innerText || "";
})()"""
"""The name of the component that has the focus."""

WAIT = 60_000
"""Milliseconds; the machine may be busy."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with web.open_app("mini-lightning", has_history=True) as blocks:
        _, address, _ = blocks.launch(
            server_port=free_port(), prevent_thread_lock=True, **launch_options("127.0.0.1")
        )
        yield address
        blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("people")
    files = [folder / "anna.png", folder / "ben.png"]
    for file, number in zip(files, (1_000_007, 1_000_011), strict=True):
        render_portrait(number).save(file)
    return files


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A new visitor."""
    yield from open_page(browser, url, viewport={"width": 1280, "height": 1000})


def open_page(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(url)
    button(tab, "Generate").wait_for()
    yield tab
    context.close()
    assert errors == []
    assert [sent for sent in requests if not sent.startswith((url, "data:", "blob:"))] == []


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def prompt(page: Any) -> Any:
    return page.get_by_label("Prompt", exact=True)


def message(page: Any, kind: str) -> str:
    """Return the message of a kind, "status" or "error", as soon as the page is ready."""
    shown = page.locator(f"#message .{kind}")
    shown.wait_for()
    page.locator("#stop").wait_for(state="hidden")
    return str(shown.inner_text())


def generate(page: Any, number: int = 1) -> str:
    page.get_by_label("Images", exact=True).and_(page.get_by_role("spinbutton")).fill(str(number))
    button(page, "Generate").click()
    page.locator("#stop").wait_for()
    return message(page, "status")


def images(page: Any) -> Any:
    return page.locator("#images .grid-wrap img")


def upload(page: Any, place: str, file: Path, number: int = 0) -> None:
    page.locator(f"{place} input[type=file]").nth(number).set_input_files(file)


def paint(page: Any, place: str, left: float, right: float) -> None:
    """Draw a line from the upper to the lower part of a canvas, at fractions of its sides."""
    canvas = page.locator(f"{place} canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    points = [
        (box["x"] + box["width"] * x, box["y"] + box["height"] * y)
        for x, y in ((left, 0.3), (right, 0.7))
    ]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


def test_first_images_of_an_invented_person_in_one_click(page: Any) -> None:
    assert images(page).count() == 0
    button(page, "Invent a person and generate").click()
    assert message(page, "status").startswith("4 images in")
    assert images(page).count() == 4
    assert page.get_by_text("Your images appear here").is_hidden()


def test_person_generated_with_and_without_identity(page: Any, people: list[Path]) -> None:
    upload(page, "#person", people[0])
    page.get_by_label("Also generate without identity, to compare").check()
    page.get_by_label("Seed").fill("18446744073709551615")
    assert generate(page).endswith("seed 18446744073709551615.")
    assert images(page).count() == 2
    box = page.locator("#compare img").first.bounding_box()
    assert box["height"] > 50 and box["x"] + box["width"] <= 1280
    with page.expect_download() as download:
        button(page, "Download all").click()
    assert download.value.suggested_filename == "images-18446744073709551615.zip"
    page.get_by_label("Seed").fill("random")
    images(page).nth(0).click()
    button(page, "Reuse this seed").click()
    playwright.expect(page.get_by_label("Seed")).to_have_value("18446744073709551615")


def test_error_is_shown_and_old_images_stay(page: Any) -> None:
    generate(page)
    source = images(page).first.get_attribute("src")
    prompt(page).fill("portrait, spaceship")
    button(page, "Generate").click()
    assert "does not know 'spaceship'" in message(page, "error")
    assert images(page).first.get_attribute("src") == source
    prompt(page).fill("portrait")
    assert generate(page).startswith("1 image in")
    assert page.locator("#message .error").count() == 0


def test_words_are_inserted_and_replaced(page: Any) -> None:
    prompt(page).fill("portrait, film noir, smiling")
    page.get_by_role("button", name="Words that the miniature knows").click()
    for word in ("laughing", "poster", "red shirt", "red shirt"):
        button(page, word).click()
    playwright.expect(prompt(page)).to_have_value("portrait, laughing, poster")


def test_two_people_in_drawn_regions(page: Any, people: list[Path]) -> None:
    page.get_by_role("tab", name="Several people").click()
    for number, file in enumerate(people):
        upload(page, "#people", file, number)
        page.locator("#people .thumbnail-lg").nth(number).wait_for()
    for number in (0, 1):
        page.get_by_label("Region").nth(number).click()
        page.get_by_role("option", name="drawn below").last.click()
    button(page, "Generate").click()
    assert "Region of person 1 is not drawn yet; draw it below in red" in message(page, "error")
    editor = page.locator("#people")
    button(editor, "Brush").click()
    paint(page, "#people", 0.42, 0.42)
    button(editor, "Color").click()
    editor.locator("button.color").nth(1).click()
    paint(page, "#people", 0.58, 0.58)
    assert generate(page).startswith("1 image in")


def test_image_is_edited_where_it_is_painted(page: Any, people: list[Path]) -> None:
    page.get_by_role("tab", name="Edit").click()
    button(page.locator("#edit"), "Brush").wait_for()
    upload(page, "#edit", people[0])
    button(page.locator("#edit"), "Brush Size").wait_for()
    paint(page, "#edit", 0.45, 0.45)
    page.wait_for_timeout(300)  # the editor draws a stroke later
    prompt(page).fill("portrait, photo, red beanie")
    page.get_by_label("Strength").first.fill("0.9")
    assert generate(page).startswith("1 image in")
    sources = [page.locator("#compare img").nth(number).get_attribute("src") for number in (0, 1)]
    before, after = (read_image(page, source) for source in sources)
    assert before.size == after.size == (96, 96)
    difference = [abs(a - b) for a, b in zip(before.tobytes(), after.tobytes(), strict=True)]
    changed = sum(value > 0 for value in difference) / len(difference)
    assert 0.05 < changed < 0.6


def read_image(page: Any, source: str) -> Image.Image:
    from io import BytesIO

    return Image.open(BytesIO(page.request.get(source).body())).convert("RGB")


def test_generated_image_is_edited_and_its_settings_come_back(page: Any) -> None:
    prompt(page).fill("portrait, photo, winking")
    page.get_by_label("Seed").fill("5")
    generate(page)
    button(page, "Edit this image").click()
    playwright.expect(page.get_by_role("tab", name="Edit")).to_have_attribute(
        "aria-selected", "true"
    )
    button(page.locator("#edit"), "Brush Size").wait_for()
    prompt(page).fill("portrait, film noir")
    page.get_by_label("Seed").fill("6")
    generate(page)
    page.get_by_role("tab", name="History").click()
    past = page.get_by_role("tabpanel").locator(".thumbnail-lg")
    past.nth(1).click()
    playwright.expect(prompt(page)).to_have_value("portrait, photo, winking")
    playwright.expect(page.get_by_label("Seed")).to_have_value("5")
    assert "are restored" in message(page, "status")


def test_history_of_another_browser_is_empty(page: Any) -> None:
    page.get_by_role("tab", name="History").click()
    page.wait_for_timeout(500)
    assert page.get_by_role("tabpanel").locator(".thumbnail-lg").count() == 0


def test_stop_keeps_finished_images(page: Any) -> None:
    page.get_by_label("Images", exact=True).and_(page.get_by_role("spinbutton")).fill("60")
    button(page, "Generate").click()
    images(page).first.wait_for()
    button(page, "Stop").click()
    assert message(page, "status").startswith("Stopped. ")
    assert 0 < images(page).count() < 60
    assert button(page, "Generate").is_enabled()


def test_keyboard_alone_is_enough(page: Any) -> None:
    """From the tabs to the prompt, and Enter generates."""
    page.get_by_role("tab", name="Create").focus()
    page.keyboard.press("ArrowRight")
    visited = []
    for _ in range(60):
        page.keyboard.press("Tab")
        visited.append(page.evaluate(FOCUSED).strip())
        if visited[-1] == "Generate":
            break
    assert visited[-1] == "Generate"
    for name in ("Invent a person", "Preview faces", "Prompt", "Seed", "Preset"):
        assert any(name in text for text in visited), (name, visited)
    page.keyboard.press("Enter")
    assert "image" in message(page, "status")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screen(browser: Any, url: str, scheme: str) -> None:
    """Nothing is wider than a telephone, and texts are legible in both schemes."""
    viewport = {"width": 390, "height": 844}
    for tab in open_page(browser, url, viewport=viewport, color_scheme=scheme, has_touch=True):
        for name in ("Create", "Edit", "Several people"):
            tab.get_by_role("tab", name=name).click()
            tab.wait_for_timeout(200)
            width = tab.evaluate("document.documentElement.scrollWidth")
            assert width <= 390, name
        tab.get_by_role("tab", name="Create").click()
        generate(tab)
        box = images(tab).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, background.removeprefix("rgb(").rstrip(")").split(",")[:3]))
        assert (brightness < 200) == (scheme == "dark")


def test_every_control_has_a_label(page: Any) -> None:
    for name in ("Create", "Edit", "Several people"):
        page.get_by_role("tab", name=name).click()
        unnamed = page.evaluate(
            """() => Array.from(document.querySelectorAll("input, textarea, select"))
              .filter((e) => e.offsetParent && e.type !== "file" && !e.labels?.length
                && !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby"))
              .map((e) => e.outerHTML)"""
        )
        assert unnamed == []
