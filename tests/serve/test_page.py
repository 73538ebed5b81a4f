"""The page in Chromium: a clip from the prompt to the download, by mouse and by keyboard, light and dark."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pylumiere.media.inputs import read_mask, request_fields
from pylumiere.media.video import read_video

from .conftest import SLOW, wait_until
from .test_applications import CLIP, PIXELS, STILL, png

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; on Debian: apt-get install chromium")

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; every request to another host and every script error fails the test."""
    contexts, wrong = [], []

    def open_(server, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: r.url.startswith((server.url, "data:", "blob:")) or wrong.append(r.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(server.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def shoot(page, name):
    """For those who look: PYLUMIERE_SHOTS=folder keeps the pictures."""
    folder = os.environ.get("PYLUMIERE_SHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_from_prompt_to_download(server, open_page, tmp_path):
    page = open_page(server)
    sync_api.expect(page.locator("#model-name")).to_have_text("tiny")
    sync_api.expect(page.locator("#empty")).to_be_visible()
    shoot(page, "empty")
    page.get_by_label("Prompt").fill("a red circle moves")
    page.get_by_label("Seed").fill("7")
    page.get_by_text("More options").click()
    page.get_by_label("Steps").fill("3")
    page.get_by_label("Width").fill("48")
    page.get_by_role("button", name="Make a clip").click()
    card = page.locator(".card").first
    sync_api.expect(card.get_by_role("heading")).to_have_text("a red circle moves")
    page.locator(".card.is-completed").wait_for()
    sync_api.expect(page.locator("#announce")).to_contain_text("is finished")
    [video] = server.http.get("/v1/videos").json()["data"]
    assert (video["seed"], video["num_inference_steps"], video["size"]) == (7, 3, "48x32")

    card.get_by_role("button", name="Play").click()
    sync_api.expect(card.get_by_role("button", name="Pause")).to_be_attached()
    with page.expect_download() as download:
        card.get_by_role("button", name="Download").or_(card.locator(".download")).first.click()
    assert download.value.suggested_filename == "a-red-circle-moves-7.mp4"
    download.value.save_as(tmp_path / "clip.mp4")
    assert read_video(tmp_path / "clip.mp4").frames.shape == (8, 32, 48, 3)
    shoot(page, "done")

    card.get_by_role("button", name="Use again").click()
    assert page.get_by_label("Seed").input_value() == "7" and page.get_by_label("Steps").input_value() == "3"
    card.get_by_role("button", name="Delete").click()
    sync_api.expect(page.locator("#empty")).to_be_visible()
    assert server.http.get("/v1/videos").json()["data"] == []


def test_progress_final_frames_and_cancel(server, open_page):
    page = open_page(server)
    page.get_by_label("Prompt").fill("something slow")
    page.get_by_text("More options").click()
    page.get_by_label("Steps").fill("1000")
    page.get_by_role("button", name="Make a clip").click()
    facts = page.locator(".card .facts")
    sync_api.expect(facts).to_contain_text("base, step")
    sync_api.expect(page.locator("#queue")).to_have_text("1 in progress")
    page.get_by_role("button", name="Cancel: something slow").click()
    sync_api.expect(page.locator("#announce")).to_contain_text("Cancelled")
    wait_until(lambda: server.service.runner.num_running == 0)

    # Another client's clip is followed too, and goes when it is cancelled there.
    id = server.create(**SLOW)
    server.wait(id, "in_progress")
    page.reload()
    card = page.locator(f'.card[data-id="{id}"]')
    sync_api.expect(card.locator(".facts")).to_contain_text("base, step")
    server.http.delete(f"/v1/videos/{id}")
    sync_api.expect(card).to_have_count(0)


def test_frames_appear_as_they_become_final(server, open_page, engine, monkeypatch):
    from pylumiere.serve.media import preview_url

    id = server.create(**SLOW)
    server.wait(id, "in_progress")
    page = open_page(server)
    page.locator(".card .facts", has_text="base, step").wait_for()
    frames = engine.generate("a", seed=1).frames
    progress = {"stage": "ssr", "step": 1, "steps": 2, "frames_final": 4, "num_frames": 8, "seconds_left": 3.2,
                "percent": 88}  # fmt: skip
    for index in range(4):
        server.service.hub.publish(id, "preview", {"frame": index, "image": preview_url(frames[index])})
    # Marks stay: those of another stage's frames, which are not the clip's, would be seen.
    server.service.hub.publish(id, "progress", {**progress, "stage": "base", "frames_final": 6})
    server.service.hub.publish(id, "progress", progress)
    sync_api.expect(page.locator(".card .film .final")).to_have_count(4)
    assert page.locator(".card .film span").count() == 8
    sync_api.expect(page.locator(".card img.still")).to_be_visible()
    assert page.locator(".card img.still").get_attribute("src").startswith("data:image/jpeg;base64,")
    shoot(page, "running")


def test_by_keyboard_alone(server, open_page):
    page = open_page(server)
    sync_api.expect(page.locator("#model-name")).to_have_text("tiny")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the clips"
    page.keyboard.press("Tab")
    page.keyboard.type("made by keys")
    page.keyboard.press("Control+Enter")
    page.locator(".card.is-completed").wait_for()
    for _ in range(20):
        page.keyboard.press("Tab")
        name = page.evaluate("() => document.activeElement.getAttribute('aria-label')")
        if name == "Delete: made by keys":
            break
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".card")).to_have_count(0)
    assert page.evaluate("() => document.activeElement.id") == "clips-title"


def test_mistakes_are_said(server, open_page):
    page = open_page(server)
    sync_api.expect(page.locator("#model-name")).to_have_text("tiny")
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.get_by_role("alert")).to_have_text("Write a prompt first.")
    page.get_by_label("Prompt").fill("a <b>bold</b> thing")
    page.get_by_label("Seed").fill("minus one")
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.get_by_role("alert")).to_contain_text("seed=")
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.locator(".card h3")).to_have_text("a <b>bold</b> thing")


def test_a_failed_clip_says_why(server, open_page):
    id = server.create(**SLOW)
    server.wait(id, "in_progress")
    page = open_page(server)
    server.service.store.fail(id, "budget_exceeded", "it needs more memory than there is")
    server.service.hub.publish(id, "status")
    sync_api.expect(page.locator(".card.is-failed .error")).to_have_text("it needs more memory than there is")
    server.service.runner.cancel(id)


# ---- applications ----------------------------------------------------------------------------------------------------


def choose(page, application, file=None, kind="image/png"):
    sync_api.expect(page.locator("#model-name")).to_have_text("tiny")
    page.get_by_label("Prompt").fill("a red circle")
    page.get_by_label("Application").select_option(application)
    if file is not None:
        page.locator("#input_reference").set_input_files({"name": "file", "mimeType": kind, "buffer": file})
        page.locator("#painter").wait_for()


def submitted(server, page):
    """The job that the button makes, when its card shows it."""
    count = page.locator(".card").count()
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.locator(".card")).to_have_count(count + 1)
    id = page.locator(".card").first.get_attribute("data-id")
    page.locator(f'.card.is-completed[data-id="{id}"]').wait_for()
    return server.service.store.get(id)


def result(server, job, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(server.http.get(f"/v1/videos/{job.id}/content").content)
    return read_video(tmp_path / "clip.mp4").frames


def test_cinemagraph_with_a_painted_mask(server, open_page, engine, tmp_path):
    page = open_page(server)
    choose(page, "cinemagraph", STILL)
    page.get_by_label("Brush").fill("25")
    box = page.locator("#mask-canvas").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    page.mouse.move(*at(0.4, 0.5))
    page.mouse.down()
    page.mouse.move(*at(0.6, 0.5), steps=4)
    page.mouse.up()
    shoot(page, "cinemagraph")
    page.get_by_label("Seed").fill("7")
    job = submitted(server, page)
    assert job.plan["application"] == "cinemagraph"
    inputs = server.service.store.inputs(job)
    mask = read_mask(inputs["mask"])
    assert mask.shape == (32, 32) and mask[16, 12:20].all() and not mask[:10].any() and not mask[22:].any()
    expected = engine.generate("a red circle", seed=7, **request_fields(image=inputs["image"], mask=inputs["mask"]))
    expected.save(tmp_path / "expected.mp4")
    assert (result(server, job, tmp_path) == read_video(tmp_path / "expected.mp4").frames).all()
    assert (expected.frames[:, ~mask] == PIXELS[0][~mask]).all()


def test_inpainting_a_clip_by_keyboard(server, open_page):
    page = open_page(server)
    choose(page, "inpainting", CLIP, "video/mp4")
    sync_api.expect(page.locator("#length-field")).to_be_hidden()  # the clip's own counts
    canvas = page.get_by_role("application", name="Mask: paint what should be made anew")
    canvas.focus()
    page.keyboard.down(" ")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    sync_api.expect(page.locator("#announce")).to_contain_text("% painted")
    shoot(page, "inpainting")
    painted = lambda: page.evaluate("() => painter.painted()")  # noqa: E731
    one = painted()
    assert 0 < one < 0.2
    page.get_by_role("button", name="Invert").click()
    assert abs(painted() - (1 - one)) < 0.02
    page.get_by_role("button", name="Erase").click()
    canvas.focus()
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press(" ")
    assert painted() < 1 - one
    page.keyboard.press("Control+z")
    page.get_by_role("button", name="Undo").click()  # the inversion
    assert abs(painted() - one) < 0.01
    job = submitted(server, page)
    mask = read_mask(server.service.store.inputs(job)["mask"])
    assert (job.plan["application"], job.plan["num_frames"]) == ("inpainting", 8)
    assert mask[16, 17] and not mask[16, :12].any()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.get_by_role("alert")).to_have_text("Paint what should be made anew first.")


def test_style_loop_and_length(server, open_page):
    page = open_page(server)
    choose(page, "text")
    page.get_by_label("Style").select_option("bold")
    page.get_by_label("Strength").fill("0.5")
    page.get_by_label("Loop").check()
    page.locator("#num_frames").fill("12")
    job = submitted(server, page)
    assert {name: job.request[name] for name in ("style", "style_strength", "loop", "num_frames")} == {
        "style": "bold", "style_strength": 0.5, "loop": True, "num_frames": 12,
    }  # fmt: skip
    sync_api.expect(page.locator(".card .facts")).to_contain_text("style bold")
    page.reload()
    page.get_by_role("button", name="Use again").click()
    assert page.get_by_label("Style").input_value() == "bold" and page.get_by_label("Loop").is_checked()


def test_keyframes_outpainting_and_video_to_video(server, open_page):
    page = open_page(server)
    choose(page, "keyframes")
    for index, pixels in ((1, PIXELS[0]), (2, PIXELS[1])):
        file = {"name": "a.png", "mimeType": "image/png", "buffer": png(pixels)}
        page.get_by_label(f"Picture of given frame {index}").set_input_files(file)
    page.get_by_label("Number of given frame 2").fill("5")
    page.get_by_role("button", name="Add a frame").click()
    shoot(page, "keyframes")
    job = submitted(server, page)
    assert job.inputs == ["keyframe_0", "keyframe_5"] and job.plan["application"] == "keyframes"
    choose(page, "outpainting", STILL)
    page.get_by_label("Left").fill("8")
    shoot(page, "outpainting")
    job = submitted(server, page)
    assert job.request["expand"] == {"left": 8, "right": 16, "top": 0, "bottom": 0} and job.inputs == ["image"]
    choose(page, "video", CLIP, "video/mp4")
    page.get_by_label("Change").fill("0.3")
    job = submitted(server, page)
    assert (job.request["strength"], job.inputs) == (0.3, ["video"])


def test_what_is_wrong_with_an_input_is_said(server, open_page):
    page = open_page(server)
    choose(page, "cinemagraph")
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.get_by_role("alert")).to_have_text("Choose a file: picture.")
    choose(page, "cinemagraph", STILL)
    page.get_by_role("button", name="Invert").click()
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.get_by_role("alert")).to_contain_text("mask: is white all over")
    shoot(page, "wrong")
    page.get_by_label("Application").select_option("video")
    page.locator("#input_reference").set_input_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": CLIP[:300]})
    sync_api.expect(page.locator("#reference-note")).to_contain_text("cannot show")
    page.get_by_role("button", name="Make a clip").click()
    sync_api.expect(page.get_by_role("alert")).to_contain_text("input_reference is damaged")
    assert server.http.get("/v1/videos").json()["data"] == []


def test_asks_for_the_key(serve, ring, open_page):
    key, _, keys = ring()
    server = serve(keys=keys)
    page = open_page(server)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    sync_api.expect(dialog.get_by_role("alert")).to_contain_text("does not know")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Use this key").click()
    sync_api.expect(page.locator("#model-name")).to_have_text("tiny")
    page.get_by_label("Prompt").fill("with a key")
    page.get_by_role("button", name="Make a clip").click()
    page.locator(".card.is-completed").wait_for()
    page.locator(".card img.still").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_and_contrast(server, open_page, scheme):
    """Every control has a name; text stands out from what is behind it by 4.5 to 1."""
    server.wait(server.create())
    page = open_page(server, color_scheme=scheme)
    page.locator(".card img.still").wait_for()
    page.get_by_text("More options").click()
    shoot(page, f"names-{scheme}")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('main button, main a, main input, main select, main textarea, progress')]
        .filter((e) => e.checkVisibility())
        .filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length)))
        .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    pairs = page.evaluate(
        """() => {
        const behind = (e) => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!c.startsWith('rgba') || !c.endsWith(' 0)')) return c; } };
        return [...document.querySelectorAll('h1,h2,h3,label,.facts,.hint,.plain,.primary,summary,.model,output')]
            .filter((e) => e.checkVisibility())
            .map((e) => [e.className || e.tagName, getComputedStyle(e).color, behind(e)]);
        }"""
    )
    assert len(pairs) > 15
    for name, ink, paper in pairs:
        assert contrast(ink, paper) >= 4.5, (name, ink, paper)


def contrast(one, other):
    def luminance(text):
        rgb = [float(v) / 255 for v in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_on_a_telephone(server, open_page):
    server.wait(server.create())
    page = open_page(server, is_mobile=True)
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator(".card img.still").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    shoot(page, "telephone")
