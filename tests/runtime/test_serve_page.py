"""The page of the service in a real browser: by mouse, by keyboard, and for screen readers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import TOKEN, Served, serving

api = pytest.importorskip("playwright.sync_api")
axe_package = pytest.importorskip("axe_core_python")
BROWSER = next(
    (found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium to look at the page with")
AXE = Path(axe_package.__file__).with_name("axe.min.js") if BROWSER else Path()
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def served(
    phantom_dir: Path, bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("page")
    shutil.copytree(bundle_dir, place / "bundle")
    shutil.copytree(phantom_dir / "new_patient" / "ct", place / "cts" / "NEW")
    words = ("--bundle", place / "bundle", "--ct-root", place / "cts")
    with serving(*words, "--backend", "onnxruntime", cache=place / "cache") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture
def tiles(phantom_dir: Path) -> list[str]:
    return [str(path) for path in sorted((phantom_dir / "new_patient").glob("*.tif"))]


@pytest.fixture
def page(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened with the token; what goes wrong in it fails the test."""
    width, height = SIZES[getattr(request, "param", "desktop")]
    context = browser.new_context(
        viewport={"width": width, "height": height}, reduced_motion="reduce"
    )
    found, faults = context.new_page(), []
    found.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.goto(f"{served.url}#token={TOKEN}")
    found.wait_for_selector("#work:not([hidden])")
    yield found
    context.close()
    assert [one for one in faults if "422" not in one] == []


def violations(page: Any) -> list[str]:
    """What axe finds; it is brought in past the page's own policy."""
    context = page.context.new_cdp_session(page)
    context.send("Page.setBypassCSP", {"enabled": True})
    context.send("Runtime.evaluate", {"expression": AXE.read_text("utf-8")})
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{one['id']}: {node['html']}" for one in found["violations"] for node in one["nodes"]]


def answered(page: Any) -> None:
    api.expect(page.locator("#progress")).to_contain_text("answered")


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_a_tile_is_classified_and_its_evidence_shown(page: Any, tiles: list[str]) -> None:
    assert "token" not in page.url
    assert violations(page) == []
    page.select_option("#scan", "NEW")
    page.set_input_files("#tiles", tiles[:2])
    page.click("#ask button")
    answered(page)
    assert page.text_content("#progress") == "2 of 2 tiles answered."
    verdicts = page.locator(".verdict").all_text_contents()
    assert len(verdicts) == 2
    assert all(re.match(r"Can't tell$|.+, \d+\.\d %$", one) for one in verdicts)
    assert "slices of" in page.locator("#answers dl").first.text_content()
    page.click("#answers button")
    page.wait_for_selector("#card-place:not([hidden])")
    card = page.frame_locator("#card")
    assert card.locator("h1").text_content() == Path(tiles[0]).name
    assert card.locator("img").count() >= 2
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_the_keyboard_is_enough(browser: Any, served: Served, tiles: list[str]) -> None:
    page = browser.new_page()
    page.goto(served.url)
    page.wait_for_selector("#door:not([hidden])")
    assert violations(page) == []
    assert page.evaluate("document.activeElement.id") == "token"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    api.expect(page.locator("#door-said")).to_have_text("That is not its token.")
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    page.set_input_files("#tiles", tiles[:1])  # the file chooser is the system's own
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring == "solid"
        if page.evaluate("document.activeElement.textContent") == "Classify":
            break
    assert reached == ["tiles", "scan", "SUMMARY", "BUTTON"]
    page.keyboard.press("Enter")
    answered(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").startswith("Evidence of ")
    page.keyboard.press("Enter")
    page.wait_for_selector("#card-place:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "card-title"
    page.close()


def test_a_tile_can_be_dropped(page: Any, tiles: list[str]) -> None:
    data = page.evaluate_handle(
        """async ([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name));
            return data;
        }""",
        [Path(tiles[0]).name, list(Path(tiles[0]).read_bytes())],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    answered(page)
    assert page.text_content("#answers .name") == Path(tiles[0]).name


def test_what_is_refused_is_told(page: Any, tmp_path: Path) -> None:
    page.click("#ask button")
    assert page.text_content("#ask-said") == "Choose a tile first."
    note = tmp_path / "note.tif"
    note.write_text("a note")
    page.set_input_files("#tiles", str(note))
    page.click("#ask button")
    answered(page)
    assert page.text_content("#ask-said").startswith("note.tif: is not a TIFF")
    assert violations(page) == []


def test_a_class_is_enrolled_from_the_page(page: Any, tiles: list[str]) -> None:
    page.fill("#label", "from the page")
    page.set_input_files("#examples", tiles[:2])
    page.click("text=Try")
    page.wait_for_selector("#taught dl")
    assert "Would be" in page.text_content("#taught")
    assert "from the page" not in page.text_content("#model")
    page.click("#teach >> text=Enrol >> nth=-1")
    api.expect(page.locator("#model")).to_contain_text("from the page")
    assert "Written" in page.text_content("#taught")
    assert violations(page) == []


def test_the_paths_are_described_in_a_page(browser: Any, served: Served) -> None:
    page, faults = browser.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"{served.url}docs")
    paths = page.locator(".opblock-summary-path")
    api.expect(paths.filter(has_text="classify")).to_have_count(1)
    assert paths.count() >= 7
    page.click(".opblock-summary-path:has-text('classify')")
    page.click("text=Try it out")
    page.locator("button", has_text=re.compile("Add .*item")).first.click()
    api.expect(page.locator("input[type=file]").first).to_be_visible()
    assert faults == []
    page.close()
