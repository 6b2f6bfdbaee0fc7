"""The page in a real browser: what a user presses, reads and sees. Skipped, with the reason, where Gradio or a Chromium is missing."""

import importlib.util
import json
import select
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from ditkit.core.errors import DitkitError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(labelled, captioned):
    """Where ``ditkit app`` serves the two bundles, in a process of its own, on a port that was free."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install 'ditkit[app]'")
    argv = [sys.executable, "-W", "ignore", "-m", "ditkit.cli.main", "app", labelled, captioned, "--port", "0"]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert select.select([server.stdout], [], [], 300)[0], "the server did not start"
        yield server.stdout.readline().split()[0]
    finally:
        server.terminate()
        server.wait(30)
        server.stdout.close()


@pytest.fixture(scope="module")
def tab(url, tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parent))
    import browser

    if browser.find() is None:
        pytest.skip(f"there is no browser: none of {', '.join(browser.NAMES)} is on the path")
    tab = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


READY = "document.querySelector('#status')?.innerText.includes('press Generate') && document.querySelector('#methods input')?.value"
IDLE = "!document.querySelector('#generate').disabled && document.querySelector('#stop').disabled"


@pytest.fixture
def page(tab, url):
    """A fresh page, its bundle loaded."""
    tab.open(url)
    tab.wait(READY)
    return tab


def generate(page, methods=None):
    if methods is not None:
        page.type("#methods input", methods)
        page.wait(f"document.querySelector('#methods input').value === '{methods}'")
    page.wait(IDLE)
    page.click("#generate")


def figure(page, name):
    return page.text(f"[data-figure={name}] b")


def test_generate_shows_pictures_times_and_the_difference(page):
    generate(page)
    page.wait("document.querySelector('[data-side=fast] .dk-below b') && document.querySelector('#status').innerText === ''")
    for side in ("base", "fast", "heat"):
        loaded = f"(i => i.complete && i.naturalWidth)(document.querySelector('[data-side={side}] img'))"
        assert page.wait(loaded) >= 384, side
    assert figure(page, "speedup").endswith("×")
    assert figure(page, "psnr").endswith("dB")
    assert float(figure(page, "maxabs")) > 0
    for side in ("base", "fast"):
        assert page.text(f"[data-side={side}] .dk-below b").split()[1] in ("ms", "s")
    assert "ditkit sample" in page.js("document.querySelector('.dk-more pre').textContent")
    page.wait(IDLE)


def test_nothing_is_asked_of_other_machines(page, url):
    assert len(page.requests) > 5
    assert [r for r in page.requests if not r.startswith((url, "data:", "blob:", "about:"))] == []
    assert page.console == []


def test_an_error_is_one_message_and_the_page_goes_on(page):
    generate(page, "fora:interval=0")
    page.wait("!!document.querySelector('.dk-error')")
    assert page.js("document.querySelectorAll('.dk-error').length") == 1
    assert "interval" in page.text(".dk-error")
    generate(page, "fora:interval=1")
    page.wait("document.querySelector('[data-figure=psnr] b')?.innerText === 'identical'")
    page.click("#stop")
    page.wait(IDLE)


def test_live_preview_and_stop(page):
    """250 steps of 64 pictures, four times at least: Stop is pressed at the first preview, and no time is ever shown."""
    for field, value in (("#steps", 250), ("#count", 64)):
        page.type(f"{field} input[type=number]", str(value))
    generate(page)
    page.wait("document.querySelector('[data-side=base] img') && (document.querySelector('#stop').click(), true)")
    page.wait("document.querySelector('#status').innerText === 'Stopped.'")
    page.wait(IDLE)
    assert page.js("document.querySelector('.dk-below b')") is None


def test_a_captioned_bundle_takes_a_prompt(page, captioned):
    page.type("#bundle input", captioned)
    page.wait("document.querySelector('#prompt textarea')?.value === 'a red circle'")
    assert page.js("document.querySelector('#label')") is None
    page.click("#timed input")
    generate(page)
    page.wait("document.querySelector('[data-side=fast] a') && document.querySelector('#status').innerText === ''")
    assert "--prompt 'a red circle'" in page.js("document.querySelector('.dk-more pre').textContent")


def test_a_narrow_page_does_not_scroll_sideways(page):
    page.resize(390, 844)
    page.wait("innerWidth === 390")
    assert page.js("document.documentElement.scrollWidth") <= 390


# the server, without a browser


def test_stop_that_is_answered_late_does_not_hide_how_the_work_ended():
    gr = pytest.importorskip("gradio")
    from ditkit.app.jobs import Job
    from ditkit.app.page import Page

    job = Job()
    page, request = SimpleNamespace(jobs={"tab": job}), SimpleNamespace(session_hash="tab")
    assert Page.halted(page, request) == gr.skip()  # its last word is still to come
    job.ended = "Stopped."
    assert Page.halted(page, request) == "Stopped."
    assert Page.halted(SimpleNamespace(jobs={}), request) == gr.skip()


def test_every_answer_forbids_other_origins(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        policy, page = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy
    config = json.JSONDecoder().raw_decode(page.partition("window.gradio_config = ")[2])[0]
    assert config["analytics_enabled"] is False
    assert url.startswith("http://127.0.0.1:")


def test_help_needs_neither_gradio_nor_torch_and_offers_no_public_link():
    program = """
import sys
from ditkit.cli.main import main
try:
    main(["app", "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert not {"torch", "gradio"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--host" in done.stdout
    assert "--share" not in done.stdout


@pytest.mark.parametrize(("argv", "words"), [(["nowhere"], "nowhere"), (["--port", "70000"], "port is 70000")])
def test_a_mistyped_command_ends_before_anything_is_imported(argv, words):
    from ditkit.cli.app import main

    with pytest.raises(DitkitError, match=words):
        main(argv)
