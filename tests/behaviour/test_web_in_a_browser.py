"""demo/web.py's page in a browser, where there are Gradio, selenium and Chromium."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import web
from conftest import DEMO, golden, golden_model
from test_web import free_port

try:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError:
    webdriver = None
CHROMIUM, DRIVER = (shutil.which("chromium") or shutil.which("chromium-browser")), shutil.which("chromedriver")
if not (web.gr and webdriver and CHROMIUM and DRIVER):
    pytest.skip("needs gradio, selenium, chromium and chromedriver", allow_module_level=True)
SCENE, PHOTO = DEMO / "images" / "scene.png", DEMO / "images" / "photo.png"


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
        browser.switch_to.window(browser.window_handles[0])
        browser.switch_to.new_window("tab")
        self.tab = browser.current_window_handle
        browser.get(address)
        self.wait(lambda: self.find("textarea"))

    def find(self, selector: str) -> list:
        self.browser.switch_to.window(self.tab)
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition):
        """Until the condition holds, a minute at most; returns it."""
        end = time.monotonic() + 60
        while not (held := condition()):
            assert time.monotonic() < end, self.find("body")[0].text
            time.sleep(0.1)
        return held

    def press(self, name: str) -> None:
        (button,) = (button for button in self.find("button") if button.text.strip().startswith(name))
        self.browser.execute_script("arguments[0].click()", button)

    def start_anew(self) -> None:
        self.press("New conversation")
        self.wait(lambda: not self.answers() and not self.find(".thumbnail-item") and not self.written())

    def ask(self, text: str, *pictures: Path) -> None:
        for count, picture in enumerate(pictures, start=1):
            (files,) = self.find("input[type=file]")
            self.browser.execute_script("arguments[0].value = ''", files)  # send_keys adds to what was sent before
            files.send_keys(str(picture))
            self.wait(lambda count=count: len(self.find(".thumbnail-item")) == count)
        self.find("textarea")[0].send_keys(text, Keys.ENTER)

    def written(self) -> str:
        return self.find("textarea")[0].get_attribute("value")

    def answers(self) -> list[str]:
        return [bubble.text for bubble in self.find("[data-testid=bot]") if bubble.text]

    def toast(self) -> str:
        return "".join(toast.text for toast in self.find("[data-testid=toast-body]"))


@pytest.fixture(scope="module")
def demo_address():
    port = free_port()
    command = [sys.executable, DEMO / "web.py", "--dtype", "float32", "--device", "cpu", "--port", f"{port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while f"127.0.0.1:{port}" not in (line := process.stderr.readline()):
        assert line, "the page ended"
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_damaged_pictures_examples_several_pictures_and_turns(browser, demo_address, tmp_path):
    visitor, damaged = Visitor(browser, demo_address), tmp_path / "damaged.png"
    damaged.write_bytes(SCENE.read_bytes()[:300])
    visitor.ask("What does the sign say?", damaged)
    visitor.wait(lambda: "damaged.png: damaged image data" in visitor.toast())
    assert "Traceback" not in visitor.find("body")[0].text and "/" not in visitor.toast()
    assert visitor.written() == "What does the sign say?"  # to be asked again
    visitor.start_anew()
    visitor.ask("Read the text.", PHOTO)
    visitor.wait(lambda: visitor.answers() == ["It says 36."])
    visitor.start_anew()
    visitor.press("What does the sign say?")
    visitor.wait(lambda: visitor.written() == "What does the sign say?")
    visitor.ask("")
    visitor.wait(lambda: visitor.answers() == ["It says PUSH."])
    visitor.start_anew()
    visitor.ask("Read the text.", SCENE, PHOTO)
    visitor.wait(lambda: len(visitor.answers()) == 1 and visitor.answers()[0].endswith("."))
    visitor.ask("How many stars are there?")
    visitor.wait(lambda: len(visitor.answers()) == 2 and visitor.answers()[1].endswith("."))


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


def test_two_visitors_at_once_a_stop_and_a_closed_tab(browser, serve):
    chat = web.Chat(*golden_model("vl-siglip"), None)  # random: it speaks until something ends it
    address = serve(chat)
    first, second = Visitor(browser, address), Visitor(browser, address)
    for visitor, longest in ((first, "4096"), (second, "16")):
        visitor.press("Options")
        (box,) = visitor.wait(lambda visitor=visitor: visitor.find("input[aria-label^='number input for Max']"))
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(longest, Keys.ENTER)
    first.ask("Tell me a story.")
    first.wait(first.answers)
    second.ask("Why?", golden("vl-siglip").folder / "images" / "0.png")
    second.wait(lambda: "The answer was cut off" in second.toast())
    before = first.answers()
    first.wait(lambda: first.answers() != before)
    assert len(chat.caches) == 1  # the first one's is in use
    first.press("Stop")
    first.wait(lambda: len(chat.caches) == 2)
    first.ask("Another one.")
    first.wait(lambda: len(first.answers()) == 2)
    browser.close()  # the first one's tab
    second.wait(lambda: len(chat.caches) == 1)  # nothing is computed for nobody


def test_boxes_are_drawn_on_the_picture(browser, serve, monkeypatch):
    model, processor = golden_model("vl2-mha")
    located = "<|ref|>the triangle<|/ref|><|det|>[[640, 350, 900, 600]]<|/det|>"
    monkeypatch.setattr(web.Chat, "answer", lambda *_, **__: iter([(located, processor.eos_token_id)]))
    visitor = Visitor(browser, serve(web.Chat(model, processor, None)))
    visitor.ask("<|ref|>the triangle<|/ref|>.", SCENE)
    visitor.wait(lambda: len(visitor.find("[data-testid=bot] img, .bot img")) == 1)
    assert visitor.answers()[0] == located
