"""The pictures of the server's page in `docs/`: a real server, a real model, a headless Chromium.

    apt-get install chromium chromium-driver
    python docs/make/serve_page.py DIR

Writes `docs/serving_desktop.png`, light, with the finished pictures, best first where the model has a CLIP, and
`docs/serving_phone.png`, dark, after five eighths of the rows.
"""

import argparse
import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

DOCS = Path(__file__).resolve().parent.parent
# The page's own functions, which stop after some rows, so that a quick model can be seen at work.
HALF = """
const whole = showPreview;
showPreview = (run, event) => { if (8 * event.rows <= 5 * event.grid) whole(run, event); };
showPicture = () => {};
"""


def start_browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(executable_path=shutil.which("chromedriver")))


def take(
    browser, address: str, *, size: tuple[int, int], dots: int, scheme: str, fields: dict, half: bool
) -> Image.Image:
    """The page as it looks in a window of `size` CSS pixels after Draw was pressed."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": dots, "mobile": dots > 1}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)
    wait = WebDriverWait(browser, 300)
    wait.until(lambda browser: browser.find_elements("css selector", "#model.ready"))
    if half:
        browser.execute_script(HALF)
    for name, value in fields.items():
        field = browser.find_element("id", name)
        if field.is_enabled():
            field.clear()
            field.send_keys(value)
    browser.find_element("id", "draw").click()
    shown = ".frame .edge" if half else ".frame img[src^=blob]"
    wait.until(lambda browser: len(browser.find_elements("css selector", shown)) == int(fields["n"]))
    wait.until(lambda browser: browser.find_element("id", "draw").text == "Draw")
    browser.execute_script("document.activeElement.blur(); scrollTo({ top: 0, behavior: 'instant' });")
    if half:
        browser.execute_script("$('status').scrollIntoView(); $('status').textContent = 'Drawing 4 pictures.';")
    return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="DIR", help="workdir of a trained transformer")
    parser.add_argument("--caption", default="a red circle above a blue square")
    parser.add_argument("--best-of", default="32")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    command = [sys.executable, "-m", "dalle_jax.cli", "serve", args.model, "--port", "0", "--deadline-s", "600"]
    server, browser = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), start_browser()
    try:
        address = server.stdout.readline().split()[-1]
        fields = {"prompt": args.caption, "n": "8", "best_of": args.best_of, "seed": "0"}
        desktop = take(browser, address, size=(1100, 1140), dots=1, scheme="light", fields=fields, half=False)
        fields["n"] = "4"
        phone = take(browser, address, size=(390, 844), dots=2, scheme="dark", fields=fields, half=True)
        desktop.save(args.out / "serving_desktop.png", optimize=True)
        phone.save(args.out / "serving_phone.png", optimize=True)
        server.send_signal(signal.SIGTERM)
        return server.wait(60)
    finally:
        browser.quit()
        server.kill()


if __name__ == "__main__":
    sys.exit(main())
