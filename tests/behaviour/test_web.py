"""demo/web.py in a browser: skipped without Gradio, selenium and Chromium.

WEB_SCREENSHOTS=FOLDER keeps what the browser showed.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, golden, golden_model

DEMO = ROOT / "demo"
sys.path.insert(0, str(DEMO))

import web  # noqa: E402

from generate import generate  # noqa: E402

try:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError:
    webdriver = None
CHROMIUM, DRIVER = (shutil.which("chromium") or shutil.which("chromium-browser")), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    not (web.gr and webdriver and CHROMIUM and DRIVER), reason="needs gradio, selenium, chromium and chromedriver"
)
SCENE, PHOTO = DEMO / "images" / "scene.png", DEMO / "images" / "photo.png"
SECONDS = 60  # the most that a test waits for what it expects


def start(*arguments, **environment) -> subprocess.Popen:
    command = [sys.executable, str(DEMO / "web.py"), "--dtype", "float32", "--device", "cpu", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_without_gradio_one_line_says_how_to_get_it(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    process = start("--port", free_port(), PYTHONPATH=str(tmp_path))
    assert process.communicate()[1] == "error: the page needs Gradio: pip install gradio\n" and process.returncode == 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port", "0"], "error: --port 0: expected 1 to 65535\n"),
        (["--host", "none.invalid"], "error: cannot listen on --host none.invalid --port 7860: [^\n]+\n"),
        (["--chunk-size", "0"], "error: chunk_size is 0, expected [^\n]+\n"),
        (["--port", "TAKEN"], "error: cannot listen on --host 127.0.0.1 --port [0-9]+: Address already in use\n"),
    ],
    ids=["no port", "no host", "no size", "taken"],
)
def test_what_cannot_be_is_one_line(arguments, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = start(*(port if argument == "TAKEN" else argument for argument in arguments))
        said = process.communicate()[1]
    assert process.returncode == 2 and re.fullmatch(message, said), said


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1100"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Visitor:
    """A tab of the browser on the page."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.switch_to.new_window("tab")
        self.tab = browser.current_window_handle
        browser.get(address)
        self.wait(lambda: self.find("textarea"))

    def find(self, selector: str) -> list:
        self.browser.switch_to.window(self.tab)
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition):
        """Until the condition holds; returns it."""
        end = time.monotonic() + SECONDS
        while not (held := condition()):
            assert time.monotonic() < end, self.find("body")[0].text
            time.sleep(0.1)
        return held

    def press(self, name: str) -> None:
        (button,) = (button for button in self.find("button") if button.text.strip().startswith(name))
        self.browser.execute_script("arguments[0].click()", button)

    def ask(self, text: str, *pictures: Path) -> None:
        for count, picture in enumerate(pictures, start=1):
            self.find("input[type=file]")[0].send_keys(str(picture))
            self.wait(lambda count=count: len(self.find("[data-testid=file-item], .thumbnail-item")) == count)
        (box,) = self.find("textarea")
        box.send_keys(text, Keys.ENTER)

    def answers(self) -> list[str]:
        return [bubble.text for bubble in self.find("[data-testid=bot]") if bubble.text]

    def error(self) -> str:
        return "".join(toast.text for toast in self.find("[data-testid=toast-body]"))

    def keep(self, name: str) -> None:
        if folder := os.environ.get("WEB_SCREENSHOTS"):
            self.find("body")
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def demo_address():
    port = free_port()
    process = start("--port", port)
    while f"127.0.0.1:{port}" not in (line := process.stderr.readline()):
        assert line, "the page ended"
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@in_browser
def test_pictures_and_turns(browser, demo_address, tmp_path):
    visitor = Visitor(browser, demo_address)
    visitor.keep("page")
    visitor.ask("What does the sign say?", SCENE)
    visitor.wait(lambda: visitor.answers() == ["It says PUSH."])
    visitor.keep("answer")
    visitor.press("New conversation")
    visitor.wait(lambda: visitor.answers() == [])
    visitor.ask("What changed?", DEMO / "images" / "before.png", DEMO / "images" / "after.png")
    visitor.wait(lambda: visitor.answers() == ["The green star moved to the center left."])
    visitor.keep("two pictures")
    visitor.ask("How many stars are there?")
    visitor.wait(lambda: len(visitor.answers()) == 2 and visitor.answers()[1].endswith("."))
    visitor.keep("second turn")


@in_browser
def test_a_damaged_upload_gives_a_message_and_stays_out_of_the_conversation(browser, demo_address, tmp_path):
    visitor, damaged = Visitor(browser, demo_address), tmp_path / "damaged.png"
    damaged.write_bytes(SCENE.read_bytes()[:300])
    visitor.ask("What does the sign say?", damaged)
    visitor.wait(lambda: "damaged.png: damaged image data" in visitor.error())
    assert "Traceback" not in visitor.find("body")[0].text and str(tmp_path) not in visitor.error()
    visitor.keep("damaged")
    visitor.press("New conversation")
    visitor.wait(lambda: not visitor.find(".thumbnail-item"))
    visitor.ask("Read the text.", PHOTO)
    visitor.wait(lambda: visitor.answers() == ["It says 36."])


@in_browser
def test_examples_fill_the_box(browser, demo_address):
    visitor = Visitor(browser, demo_address)
    visitor.press("What does the sign say?")
    visitor.wait(lambda: visitor.find("textarea")[0].get_attribute("value") == "What does the sign say?")
    visitor.ask("")
    visitor.wait(lambda: visitor.answers() == ["It says PUSH."])


@pytest.fixture
def serve():
    """serve(chat) -> the address of its page."""
    pages = []

    def make(chat: web.Chat) -> str:
        pages.append(web.build_page(chat, "DeepSeek-VL", ""))
        return pages[-1].launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")[1]

    yield make
    for page in pages:
        page.close(verbose=False)


@in_browser
def test_two_visitors_at_once_and_a_stop(browser, serve):
    model, processor = golden_model("vl-siglip")  # random: it speaks until it is stopped
    address = serve(web.Chat(model, processor, None))
    prompts = {"long": "Tell me a story.", "short": "Why?"}
    batches = {name: processor([{"role": "user", "content": text}]) for name, text in prompts.items()}
    picture = golden("vl-siglip").folder / "images" / "0.png"
    (ids,) = generate(model, processor([{"role": "user", "content": "Why?", "images": [picture]}]), max_new_tokens=16)
    first, second = Visitor(browser, address), Visitor(browser, address)
    second.press("Options")
    (longest,) = second.wait(lambda: second.find("input[aria-label='number input for Max Generation Tokens']"))
    longest.send_keys(Keys.CONTROL, "a")
    longest.send_keys("16", Keys.ENTER)
    second.keep("options")
    first.press("Options")
    (longest,) = first.wait(lambda: first.find("input[aria-label='number input for Max Generation Tokens']"))
    longest.send_keys(Keys.CONTROL, "a")
    longest.send_keys("4096", Keys.ENTER)
    first.ask(prompts["long"])
    first.wait(first.answers)
    second.ask("Why?", picture)
    assert batches
    second.wait(lambda: "cut off after 16 tokens" in second.error())
    print(second.answers(), processor.decode(ids))
    before = first.answers()
    first.wait(lambda: first.answers() != before)
    first.press("Stop")
    time.sleep(1)
    before = first.answers()
    time.sleep(1)
    assert first.answers() == before
    first.keep("stopped")
