"""The page at `/` in a headless Chromium: drawn row by row, ranked, downloaded, by keyboard, on a phone."""

import dataclasses
import json
import re
import shlex
import shutil
import urllib.request

import pytest

from dalle_jax.sample import request
from dalle_jax.serve import page, schema
from tests.support import until
from tests.support.stand_in_server import GRID, VOCAB, NoisePipeline, metric, post, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (apt: chromium-driver)"
)
DESKTOP, PHONE = (1280, 900), (390, 844)


def start_browser(downloads):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(executable_path=DRIVER))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = start_browser(tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pipe():
    return NoisePipeline(step_seconds=0.02)


@pytest.fixture(scope="module")
def server(pipe):
    with serving(pipe) as server:
        yield server


def screen(browser, size):
    """A window of this many CSS pixels; phones have two dots a pixel and fingers."""
    metrics = {
        "width": size[0],
        "height": size[1],
        "deviceScaleFactor": 2 if size == PHONE else 1,
        "mobile": size == PHONE,
    }
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_page(browser, server, size=DESKTOP):
    screen(browser, size)
    browser.get_log("browser")
    browser.get(server.address)
    until(lambda: text(browser, "#model") == "noise")


def one(browser, selector):
    return browser.find_element("css selector", selector)


def every(browser, selector):
    return browser.find_elements("css selector", selector)


def text(browser, selector):
    return one(browser, selector).text


def write(browser, **fields):
    for name, value in fields.items():
        field = one(browser, f"#{name}")
        field.clear()
        field.send_keys(str(value))


def drawn(browser, pictures):
    return lambda: len(every(browser, ".run:first-child .frame img[src^=blob]")) == pictures


def pixels_shown(browser, selector):
    """RGB of the picture in an img element, as the browser has decoded it."""
    flat = browser.execute_script(
        "const image = document.querySelector(arguments[0]), canvas = document.createElement('canvas');"
        "canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;"
        "const pen = canvas.getContext('2d'); pen.drawImage(image, 0, 0);"
        "return [...pen.getImageData(0, 0, canvas.width, canvas.height).data];",
        selector,
    )
    return bytes(value for i, value in enumerate(flat) if i % 4 < 3)


def test_the_page_is_whole_and_asks_nobody_else():
    html = page.html()
    assert not re.findall(r"""(?:src|href)=["'](?!data:,)""", html) and "@import" not in html and "url(" not in html
    assert " style=" not in html and not re.search(r"\son\w+=", html)  # the policy would block them
    policy = page.policy()
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "http" not in policy


def test_the_fields_are_the_options_of_the_model(server, pipe):
    """The page makes them of what the server says; the caption is its only field without the model."""
    _, _, answer = post(server, None, "/v1/models", {}, "GET")
    described = {option["name"]: option for option in answer["data"][0]["options"]}
    common = ["n", "best_of", "seed", "guidance"]
    assert [*described] == [*common, "temperature", "top_k", "top_p", "keep_rows"]
    for option in schema.options(pipe):
        assert described[option.name] == dataclasses.asdict(option) | {"kind": option.kind.__name__}
    assert (described["n"]["max"], described["top_k"]["max"]) == (schema.MAX_N, VOCAB)
    assert described["seed"]["default"] is None  # drawn anew
    html = page.html()
    assert re.findall(r'<(?:input|textarea) id="(\w+)"', html) == ["token", "prompt"]
    assert f'maxlength="{request.MAX_CAPTION}"' in html


@in_browser
def test_rows_appear_and_the_ranked_pictures_are_those_of_the_api(browser, server, pipe, tmp_path):
    open_page(browser, server)
    assert "row by row" in text(browser, "#runs")
    write(browser, prompt="a star", n=3, best_of=8, seed=5)
    pipe.hold()
    one(browser, "#draw").click()
    until(lambda: len(every(browser, ".run .frame")) == 3)
    assert text(browser, "#draw") == "Stop"
    pipe.generator.step_seconds = 0.3
    pipe.release()
    until(lambda: len(every(browser, ".frame img")) == 3)
    assert re.fullmatch(rf"row [1-{GRID - 1}] of {GRID}", text(browser, "figcaption"))
    assert "inset(" in one(browser, ".frame img").get_attribute("style")
    until(drawn(browser, 3))
    pipe.generator.step_seconds = 0.02
    assert text(browser, "#status") == "Finished 3 pictures."
    body = {"prompt": "a star", "n": 3, "best_of": 8, "seed": 5, "response_format": "b64_json"}
    answer = urllib.request.urlopen(
        urllib.request.Request(
            f"{server.address}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
    )
    captions = [caption.text.replace("\n", " ") for caption in every(browser, "figcaption")]
    expected = json.load(answer)["data"]
    assert captions == [f"{i + 1} score {p['score']:.3f} seed {p['seed']}" for i, p in enumerate(expected)]
    best = max((pipe.picture(pipe.batches[-1][0], m) for m in range(8)), key=lambda picture: picture.score)
    assert pixels_shown(browser, ".frame img") == best.tobytes()
    assert one(browser, ".frame img").get_attribute("alt") == f"a star, seed {expected[0]['seed']}"
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    one(browser, "figcaption a").click()
    file = tmp_path / f"a-star-{expected[0]['seed']}.png"
    until(file.exists)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert browser.get_log("browser") == []  # nothing blocked by the policy, no error


@in_browser
def test_the_curl_line_draws_the_same(browser, server, pipe):
    open_page(browser, server)
    write(browser, prompt='it\'s a "star"', n=1)
    one(browser, "#draw").click()
    until(drawn(browser, 1))
    shown = pipe.batches[-1][0]
    words = shlex.split(browser.execute_script("return document.querySelector('#curl').textContent"))
    assert words[:2] == ["curl", f"{server.address}/v1/images/generations"]
    body = json.loads(words[words.index("-d") + 1])
    assert body == {"prompt": 'it\'s a "star"', "n": 1, "seed": shown.seed}  # left to chance, so the page chose one
    assert words[words.index("-H") + 1] == "Content-Type: application/json"


@in_browser
def test_every_option_reaches_the_model_and_a_refusal_its_field(browser, server, pipe):
    open_page(browser, server)
    every(browser, "summary")[0].click()
    write(browser, prompt="a star", n=2, best_of=4, seed=9, temperature=0.5, top_k=3, top_p=0.8, guidance=2)
    one(browser, "#draw").click()
    until(drawn(browser, 2))
    asked = pipe.batches[-1][0]
    assert (asked.n, asked.best_of, asked.seed, asked.guidance) == (2, 4, 9, 2.0)
    assert asked.options == {"temperature": 0.5, "top_k": 3, "top_p": 0.8}
    write(browser, best_of=1)  # below n, which only the server checks
    one(browser, "#draw").click()
    until(lambda: "best_of must be at least n = 2" in text(browser, "#trouble"))
    assert browser.switch_to.active_element.get_attribute("id") == "best_of"
    assert one(browser, "#best_of").get_attribute("aria-invalid") == "true"
    assert one(browser, "#trouble").get_attribute("role") == "alert"
    assert len(every(browser, ".run")) == 1


@in_browser
def test_stop_cancels_the_work(browser, server, pipe):
    """Enter in a field draws, and stops nothing."""
    from selenium.webdriver import Keys

    open_page(browser, server)
    write(browser, prompt="a star", n=1)
    batches = len(pipe.batches)
    pipe.hold()
    one(browser, "#n").send_keys(Keys.ENTER)
    until(lambda: len(pipe.batches) == batches + 1)
    one(browser, "#n").send_keys(Keys.ENTER)
    assert browser.execute_script("return running && !running.signal.aborted")
    one(browser, "#draw").click()
    until(lambda: text(browser, "#status") == "Stopped.")
    until(lambda: metric(server, "dalle_jax_cancelled_total") >= 1)
    pipe.release()
    assert text(browser, "#draw") == "Draw" and not every(browser, ".run")
    until(lambda: pipe.steps_drawn[-1] < GRID)


@in_browser
def test_by_keyboard_alone(browser, server):
    from selenium.webdriver import ActionChains, Keys

    open_page(browser, server)

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()

    def focused():
        return browser.switch_to.active_element

    order = []
    for _ in range(7):
        press(Keys.TAB)
        order.append(focused().get_attribute("id") or focused().tag_name)
    assert order == ["prompt", "draw", "n", "best_of", "seed", "summary", "summary"]
    one(browser, "#prompt").send_keys("a star", Keys.ENTER)
    until(drawn(browser, 4))
    every(browser, "summary")[0].click()
    names = [field.accessible_name for field in every(browser, "input, textarea") if field.is_displayed()]
    assert names == ["Caption", "Pictures", "Best of", "Seed", "Guidance", "Temperature", "Top k", "Top p"]
    while focused().tag_name != "a":
        press(Keys.TAB)
    assert focused().accessible_name.startswith("Download picture 1, seed")
    assert focused().value_of_css_property("outline-style") == "solid"


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off_and_everything_can_be_read(browser, server, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    open_page(browser, server, PHONE)
    write(browser, prompt="a star", n=2)
    one(browser, "#draw").click()
    until(drawn(browser, 2))
    for summary in every(browser, "summary"):
        summary.click()
    assert browser.execute_script("return document.documentElement.scrollWidth") == PHONE[0]
    for control in every(browser, "button, input, textarea, summary, a.button"):
        if control.is_displayed():
            assert control.rect["height"] >= 36 and control.rect["x"] + control.rect["width"] <= PHONE[0]
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 20
    assert min(contrasts.values()) >= 4.5, {name: value for name, value in contrasts.items() if value < 4.5}  # WCAG AA
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 384) == (scheme == "dark")


# Contrast of every element's own text with the first opaque background behind it, by WCAG 2's formula.
CONTRASTS = """
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => parts(colour).slice(0, 3).map((c) => (c /= 255) <= 0.04045 ? c / 12.92
  : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor, alpha = parts(colour)[3];
    if (alpha === undefined || alpha === 1) return colour;
  }
  return "rgb(255, 255, 255)";
};
const result = {};
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE", "TEXTAREA"].includes(element.tagName)) continue;
  const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
  result[`${element.tagName} ${element.id || element.textContent.slice(0, 30)}`] =
    (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
return result;
"""


@in_browser
def test_a_server_with_a_token_asks_for_it(browser):
    with serving(NoisePipeline(), token="s3cret") as server:
        browser.get(server.address)
        until(lambda: one(browser, "#token").is_displayed())
        write(browser, token="guess", prompt="a star")
        one(browser, "#draw").click()
        until(lambda: "does not know this token" in text(browser, "#trouble"))
        assert one(browser, "#token").get_attribute("aria-invalid") == "true"
        assert browser.switch_to.active_element.get_attribute("id") == "draw"  # not taken away from who writes
        write(browser, token="s3cret")
        one(browser, "#draw").click()
        until(drawn(browser, 4))
        assert text(browser, "#model") == "noise" and not one(browser, "#trouble").is_displayed()
        assert "Bearer $DALLE_JAX_TOKEN" in browser.execute_script("return document.querySelector('#curl').textContent")
        assert "s3cret" not in browser.page_source


@in_browser
def test_a_model_without_clip_cannot_be_asked_to_rank(browser):
    with serving(NoisePipeline(ranking=False)) as server:
        open_page(browser, server)
        assert not one(browser, "#best_of").is_enabled() and "no CLIP" in text(browser, "#best_of-hint")
        write(browser, prompt="a star", n=1, seed=1)
        one(browser, "#draw").click()
        until(drawn(browser, 1))
        assert text(browser, "figcaption") == "seed 1"
