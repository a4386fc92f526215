"""The web page in a browser: headless Chromium, with the few-step miniature."""

from __future__ import annotations

import shutil
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openpulid.identity.identity import Identity
from openpulid.io.images import open_mask
from openpulid.web import page as web
from openpulid.web.server import launch_options
from openpulid.world.gallery import render_portrait
from tests.web.page_scripts import DROPPED_FILE, FOCUSED, LOW_CONTRAST, OUTSIDE
from tests.web.page_support import free_port

pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install the package chromium or google-chrome"
)
WAIT = 60_000
"""Milliseconds; the machine may be busy."""
playwright.expect.set_options(timeout=WAIT)


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


@pytest.fixture(scope="module")
def visitor(browser: Any) -> Iterator[Any]:
    """The browser of one visitor, which keeps the page's code.

    A click is lost if the page scrolls between pressing and releasing the button, so the visitor
    asks for no motion.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, reduced_motion="reduce")
    yield context
    context.close()


@pytest.fixture
def page(visitor: Any, url: str) -> Iterator[Any]:
    """A new tab of the same visitor."""
    yield from open_page(visitor, url)


def open_page(context: Any, url: str) -> Iterator[Any]:
    context.set_default_timeout(WAIT)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(url)
    button(tab, "Generate").wait_for()
    yield tab
    tab.close()
    assert errors == []
    assert [sent for sent in requests if not sent.startswith((url, "data:", "blob:"))] == []


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def open_panel(page: Any, name: str) -> None:
    """Open or close a panel. Gradio soon sets the values in an opened one again."""
    page.get_by_role("button", name=name).filter(visible=True).first.click()
    page.wait_for_timeout(500)


def fill_until_kept(field: Any, value: str) -> None:
    """Fill a field, again if Gradio has reset it while it opened the panel."""
    for _ in range(10):
        field.fill(value)
        field.page.wait_for_timeout(300)
        if field.input_value() == value:
            return
    raise AssertionError(f"the field does not keep {value!r}")


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


def test_error_is_shown_in_its_place_and_old_images_stay(page: Any) -> None:
    generate(page)
    source = images(page).first.get_attribute("src")
    prompt(page).fill("portrait, spaceship")
    button(page, "Generate").click()
    assert "does not know 'spaceship'" in message(page, "error")
    mark = page.locator(".mark .error")
    assert "does not know 'spaceship'" in mark.inner_text()
    playwright.expect(mark).to_be_in_viewport()
    page.wait_for_timeout(200)  # the page scrolls to the error
    assert images(page).first.get_attribute("src") == source
    prompt(page).fill("portrait")
    open_panel(page, "More options")
    steps = page.get_by_label("Steps", exact=True)
    fill_until_kept(steps, "0")
    open_panel(page, "More options")
    steps.wait_for(state="hidden")
    button(page, "Generate").click()
    mark = mark.filter(has_text="Steps must be at least 1")
    mark.wait_for()  # the panel around it is open again
    playwright.expect(mark).to_be_in_viewport()
    assert "Steps must be at least 1 on this page" in message(page, "error")
    steps.fill("4")
    assert generate(page).startswith("1 image in")
    assert page.locator("#message .error").count() == page.locator(".mark .error").count() == 0


def test_files_get_lines_for_their_values(page: Any, tmp_path: Path) -> None:
    open_panel(page, "LoRA and textual inversion")
    for name, text, number, line in (
        ("film.safetensors", "LoRAs and their scales", 0, "film.safetensors:1"),
        ("noir.safetensors", "Words of textual inversion", 1, "noir.safetensors:noir"),
    ):
        (tmp_path / name).write_bytes(b"no weights")
        inputs = page.locator("#shared input[type=file][accept='.safetensors'][multiple]")
        inputs.nth(number).set_input_files(tmp_path / name)
        playwright.expect(page.get_by_label(text)).to_have_value(line)
    button(page, "Generate").click()
    mark = page.locator(".mark .error")
    mark.wait_for()
    assert mark.inner_text().startswith("film.safetensors ")


def test_identity_is_saved(page: Any, people: list[Path], tmp_path: Path) -> None:
    upload(page, "#person", people[0])
    page.locator("#person .thumbnail-lg").wait_for()
    button(page, "Save identity").click()
    saved = button(page, "Download anna.safetensors")
    saved.wait_for()
    with page.expect_download() as download:
        saved.click()
    download.value.save_as(tmp_path / "anna.safetensors")
    identity = Identity.load(tmp_path / "anna.safetensors")
    assert download.value.suggested_filename == "anna.safetensors"
    assert identity.fingerprint
    button(page.locator("#person"), "Invent a person").click()
    saved.wait_for(state="hidden")


def test_words_are_inserted_and_replaced(page: Any) -> None:
    prompt(page).fill("portrait, film noir, smiling")
    page.get_by_role("button", name="Words that the miniature knows").click()
    for word in ("laughing", "poster", "red shirt", "red shirt"):
        button(page, word).click()
    playwright.expect(prompt(page)).to_have_value("portrait, laughing, poster")


def test_two_people_in_their_regions(page: Any, people: list[Path], tmp_path: Path) -> None:
    page.get_by_role("tab", name="Several people").click()
    for number, file in enumerate(people):
        upload(page, "#group", file, number)
        page.locator("#group .thumbnail-lg").nth(number).wait_for()
    for number in (0, 1):
        choose_region(page, number, "drawn below")
    button(page, "Generate").click()
    assert "Region of person 1 is not drawn yet; draw it below in red" in message(page, "error")
    playwright.expect(page.locator(".mark .error")).to_be_in_viewport()
    editor = page.locator("#group")
    button(editor, "Brush").click()
    paint(page, "#group", 0.42, 0.42)
    button(editor, "Color").click()
    editor.locator("button.color").nth(1).click()
    paint(page, "#group", 0.58, 0.58)
    button(page, "Download the regions").click()
    files = page.locator("#regions a[download]")
    playwright.expect(files).to_have_count(2)
    masks = []
    for number in (0, 1):
        with page.expect_download() as download:
            files.nth(number).click()
        masks.append(tmp_path / download.value.suggested_filename)
        download.value.save_as(masks[-1])
    assert [mask.name for mask in masks] == ["region-1.png", "region-2.png"]
    red, blue = (open_mask(mask).getbbox() for mask in masks)
    assert red is not None and blue is not None and red[2] < 256 < blue[0]
    open_panel(page, "Draw the regions")  # close it: a canvas is drawn all the time
    assert generate(page).startswith("1 image in")
    choose_region(page, 0, "a mask file")
    upload(page, ".mask-file", masks[0])
    page.get_by_label("Region").nth(1).fill("0.5,0,1,1")
    page.get_by_label("Region").nth(1).press("Tab")
    assert generate(page).startswith("1 image in")


def choose_region(page: Any, number: int, name: str) -> None:
    page.get_by_label("Region").nth(number).click()
    page.get_by_role("option", name=name).last.click()


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
    page.get_by_label("Several people").check()
    playwright.expect(page.locator("#person")).to_be_hidden()
    open_panel(page, "Draw the regions")
    button(page.locator("#group"), "Brush").wait_for()
    button(page, "Draw on the image to edit").click()
    button(page.locator("#group"), "Brush Size").wait_for(state="attached")
    page.wait_for_timeout(500)
    shown = Image.open(BytesIO(page.locator("#group canvas").first.screenshot())).convert("RGB")
    assert len(shown.getcolors(1 << 20)) > 200  # the photo, not an empty canvas


def read_image(page: Any, source: str) -> Image.Image:
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


def test_dropped_image_restores_its_settings(page: Any) -> None:
    prompt(page).fill("portrait, photo, winking")
    page.get_by_label("Seed").fill("8")
    generate(page)
    content = page.request.get(images(page).first.get_attribute("src")).body()
    page.reload()
    button(page, "Generate").wait_for()
    open_panel(page, "Restore the settings of an image")
    data = page.evaluate_handle(DROPPED_FILE, b64encode(content).decode())
    page.locator("#restore button").first.dispatch_event("drop", {"dataTransfer": data})
    playwright.expect(prompt(page)).to_have_value("portrait, photo, winking")
    playwright.expect(page.get_by_label("Seed")).to_have_value("8")
    assert "The settings of image.png are restored" in message(page, "status")


def test_stop_keeps_finished_images(page: Any) -> None:
    page.get_by_label("Images", exact=True).and_(page.get_by_role("spinbutton")).fill("60")
    button(page, "Generate").click()
    images(page).first.wait_for()
    button(page, "Stop").click()
    assert message(page, "status").startswith("Stopped. ")
    assert 0 < images(page).count() < 60
    assert button(page, "Generate").is_enabled()


def test_second_run_is_not_begun_from_the_prompt(page: Any) -> None:
    page.get_by_label("Images", exact=True).and_(page.get_by_role("spinbutton")).fill("60")
    prompt(page).press("Shift+Enter")
    images(page).first.wait_for()
    prompt(page).press("Shift+Enter")
    button(page, "Stop").click()
    assert message(page, "status").startswith("Stopped. ")
    page.wait_for_timeout(1000)
    assert button(page, "Generate").is_enabled()  # no second run was waiting


def test_stop_leaves_the_queue(browser: Any, page: Any, url: str) -> None:
    page.get_by_label("Images", exact=True).and_(page.get_by_role("spinbutton")).fill("60")
    open_panel(page, "More options")
    fill_until_kept(page.get_by_label("Steps", exact=True), "100")
    button(page, "Generate").click()
    images(page).first.wait_for()
    context = browser.new_context(reduced_motion="reduce")
    for other in open_page(context, url):
        button(other, "Generate").click()
        other.get_by_text("queue").first.wait_for()
        button(other, "Stop").click()
        assert "before the first image" in message(other, "status")
        assert button(other, "Generate").is_enabled()
        playwright.expect(page.locator("#stop")).to_be_visible()  # the first visitor's run goes on
    context.close()
    button(page, "Stop").click()
    assert message(page, "status").startswith("Stopped. ")


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
    context = browser.new_context(
        viewport=viewport, color_scheme=scheme, has_touch=True, reduced_motion="reduce"
    )
    for tab in open_page(context, url):
        for panel in ("Identity file, or which face", "More options", "Small faces", "ControlNet"):
            open_panel(tab, panel)
        generate(tab)
        box = images(tab).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        for name in ("Edit", "Several people", "History", "About", "Create"):
            tab.get_by_role("tab", name=name).click()
            if name == "History":
                tab.locator("#past .thumbnail-lg").first.wait_for()
                assert tab.locator("#past .thumbnail-lg").count() == 1  # that of this visitor
                button(tab, "Delete all").click(trial=True)
            if name == "About":
                last = tab.get_by_text("keep it like a photo of the person")
                last.scroll_into_view_if_needed()
                playwright.expect(last).to_be_in_viewport()
            tab.wait_for_timeout(200)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, name
            assert tab.evaluate(OUTSIDE) == [], name
            assert tab.evaluate(LOW_CONTRAST) == {}, name
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, background.removeprefix("rgb(").rstrip(")").split(",")[:3]))
        assert (brightness < 200) == (scheme == "dark")
    context.close()


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
