"""The report in a browser: everything is drawn, the controls work, hostile text is text, and nothing is fetched."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebft.report import write_report
from report_folders import HOSTILE, make_comparison, make_run

try:
    from selenium import webdriver
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    webdriver = None
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if webdriver is None or CHROMIUM is None or DRIVER is None:
    pytest.skip("needs selenium, chromium and chromedriver", allow_module_level=True)

PATIENCE = 60  # seconds, on a machine that is busy with something else
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    options.add_argument("--no-first-run")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    for feature in QUIET:
        options.add_argument(f"--disable-{feature}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """A report that is open; questions to it are asked in JavaScript."""

    def __init__(self, browser, path):
        self.browser = browser
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # forget what other pages logged
        browser.get(path.as_uri())

    def ask(self, script, *arguments):
        return self.browser.execute_script(f"return {script}", *arguments)

    def wait(self, script):
        WebDriverWait(self.browser, PATIENCE, poll_frequency=0.05).until(lambda _: self.ask(script))

    def mark(self, name) -> float:
        """Milliseconds from the start of navigation."""
        self.wait(f"performance.getEntriesByName('{name}').length > 0")
        return self.ask(f"performance.getEntriesByName('{name}')[0].startTime")

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def choose(self, selector, value):
        """Choose in a list as a reader does."""
        self.find(f"{selector} option[value='{value}']").click()

    def texts(self, selector) -> list[str]:
        return self.ask("[...document.querySelectorAll(arguments[0])].map((found) => found.textContent)", selector)

    def numbers(self, key) -> list[float]:
        texts = self.texts(f"#completions div[data-key={key}] dd")
        return [float(text.replace("\u2212", "-")) for text in texts]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def fetched(self) -> list[str]:
        """What the page, and not the browser for its own ones, asked the network or the disk for, beside itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        page = self.browser.current_url
        urls = [request["request"]["url"] for request in sent if request["documentURL"].startswith(page)]
        assert any(url.startswith(page) for url in urls), "the page itself is among the requests that are seen"
        return [url for url in urls if not url.startswith(("data:", "blob:", page))]


@pytest.fixture(scope="module")
def comparison(browser, tmp_path_factory):
    return write_report([make_comparison(tmp_path_factory.mktemp("browser") / "comparison")])


@pytest.fixture
def opened(browser, tmp_path):
    return Page(browser, write_report([make_run(tmp_path / "run", contexts=20)]))


def test_everything_is_drawn(browser, comparison):
    page = Page(browser, comparison)
    page.mark("figures-drawn")
    titles = page.texts("figcaption")
    assert len(titles) == 4 + 1 + 8 + 3
    assert page.ask("document.querySelectorAll('.plot .main-svg').length") >= len(titles)
    # Base across, and three methods with a band and a line each.
    lines = page.ask(
        "[...document.querySelectorAll('#training .plot')].map((p) => p.data.map((t) => t.name ?? 'band'))"
    )
    assert lines == [["base", "band", "sft", "band", "rlvr", "band", "ebft"]] * 4
    assert "loss=nan at step 7: lower learning_rate" in page.texts("#results td")
    assert {"p 0.014", "p 0.0001", "one seed"} <= set(page.texts("#results td small"))
    assert page.errors() == [] and page.fetched() == []


def test_completions_of_rlvr_have_a_reward_and_no_features(browser, tmp_path):
    run = make_run(tmp_path / "run", contexts=5)
    kept = ("step", "document_id", "block", "context", "reference", "rollout", "completion", "token_texts", "reward")
    for path in (run / "rollouts").iterdir():
        rows = [{name: row[name] for name in kept} for row in pq.read_table(path).to_pylist()]
        for row in rows:
            row["advantage"] = None if row["document_id"] else row["reward"] - 0.5
        pq.write_table(pa.Table.from_pylist(rows), path)
    page = Page(browser, write_report([run]))
    page.mark("viewer-usable")
    assert page.texts("#completions li:first-child dt") == ["advantage", "reward"]
    assert page.numbers("advantage") == pytest.approx([value - 0.5 for value in page.numbers("reward")], abs=1e-3)
    assert page.numbers("reward") == sorted(page.numbers("reward"), reverse=True)
    assert "feature-matching loss" not in page.texts("#where")[0]
    page.find("#contexts li:last-child").click()
    assert page.texts("#completions li:first-child dt") == ["reward"]
    assert page.errors() == []


def test_horizontal_axis_can_be_switched(browser, comparison):
    page = Page(browser, comparison)
    page.mark("figures-drawn")
    ends = "Math.max(...document.querySelector('#training .plot').data.at(-1).x)"
    assert page.ask(ends) == 320
    for value, last in (("seconds", 100), ("step", 40)):
        page.find(f"input[value={value}]").send_keys(Keys.SPACE)  # as a reader without a mouse would
        page.wait(f"{ends} === {last}")
    assert page.errors() == []


def test_panels_without_data_say_so(opened):
    opened.mark("figures-drawn")
    assert len(opened.texts("#training .empty")) == 2
    assert "ebft evaluate" in opened.texts("#length .empty")[0]
    assert opened.errors() == [] and opened.fetched() == []


def test_sorting_sorts(opened):
    opened.mark("viewer-usable")
    for key in ("advantage", "alignment", "diversity", "log_prob"):
        opened.choose("#sort", key)
        down = opened.numbers(key)
        assert len(set(down)) == 4 and down == sorted(down, reverse=True)
        opened.find("#direction").click()
        assert opened.numbers(key) == down[::-1]
        opened.find("#direction").click()
    opened.choose("#sort", "sampled")
    rollouts = opened.ask("contextsOf(Number(at.step.value))[0].rollouts.map((r) => r.advantage)")
    assert opened.numbers("advantage") == pytest.approx(rollouts, abs=1e-4)


def test_steps_and_contexts_can_be_chosen(opened):
    opened.mark("viewer-usable")
    assert opened.ask("at.step.selectedOptions[0].text") == "12"
    before = opened.texts("#context")
    opened.choose("#step", 0)
    assert opened.texts("#context") != before
    assert opened.find("#step-before") and opened.texts("#where")[0].startswith("document 0, token 0 ")
    opened.find("#after").click()
    opened.find("#after").click()
    assert opened.texts("#where")[0].startswith("document 0, token 16 ")
    opened.find("#contexts li:nth-child(6)").click()
    assert opened.texts("#where")[0].startswith("document 1, token 8 ")
    opened.find("#step-after").click()
    assert opened.ask("at.step.selectedOptions[0].text") == "6"
    opened.choose("#order", "loss")
    losses = [float(text) for text in opened.texts("#contexts .figure")]
    assert losses == sorted(losses, reverse=True) and len(losses) == 20
    assert opened.errors() == []


def test_keys(opened):
    opened.mark("viewer-usable")
    body = opened.find("body")
    body.send_keys(Keys.ARROW_RIGHT)
    body.send_keys("[")
    assert opened.ask("[at.step.selectedOptions[0].text, current]") == ["9", 0]
    body.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    opened.find("#contexts [aria-selected=true]").send_keys(Keys.ARROW_DOWN)
    assert opened.ask("[current, document.activeElement.getAttribute('aria-selected')]") == [2, "true"]
    body.send_keys("/")
    assert opened.ask("document.activeElement.id") == "filter"
    opened.find("#filter").send_keys("]", Keys.ARROW_LEFT)  # typed, not obeyed
    assert opened.ask("[at.step.selectedOptions[0].text, at.filter.value]") == ["9", "]"]


def test_filter(browser, tmp_path):
    texts = ("apples", "Pears and apples", "plums")
    page = Page(browser, write_report([make_run(tmp_path / "run", texts=texts)]))
    page.mark("viewer-usable")
    page.find("#filter").send_keys("APPLES")
    assert page.texts("#contexts .end") == ["apples", "Pears and apples"] * 2
    assert page.texts("#shown") == ["4 of 6 contexts"]
    page.find("#filter").send_keys(" or not")
    assert page.texts("#contexts li") == [] and not page.find("#group").is_displayed()
    page.find("#filter").clear()
    page.ask("at.filter.dispatchEvent(new Event('input'))")
    assert len(page.texts("#contexts li")) == 6 and page.find("#group").is_displayed()


def test_tokens_are_colored_by_log_prob(opened):
    opened.mark("viewer-usable")
    opened.choose("#sort", "sampled")
    rollout = opened.ask("contextsOf(Number(at.step.value))[0].rollouts[0]")
    spans = "[...document.querySelector('#completions .words').children]"
    shares = opened.ask(f"{spans}.map((span) => Number(span.style.getPropertyValue('--surprise')))")
    assert shares == pytest.approx([min(1, -value / 8) for value in rollout["log_probs"]])
    colors = opened.ask(f"{spans}.map((span) => getComputedStyle(span).backgroundColor)")
    assert len(set(colors)) == len(set(shares))
    assert opened.texts("#completions .words")[0].replace("\u21b5", "") == "".join(rollout["tokens"])


def test_hostile_text_is_shown_and_not_run(browser, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    settings = {"model_name_or_path": HOSTILE[0], "dataset_name": HOSTILE[1]}
    folder = make_run(tmp_path / name, texts=HOSTILE, settings=settings)
    with open(folder / "metrics.jsonl", "a") as file:
        named = {"<script>window.hacked = 3</script> \ud800": 1.0, "eval_a\u202eb/greedy/pass@1": 1.0}
        file.write(json.dumps({"step": 12, **named}) + "\n")
    page = Page(browser, write_report([folder]))
    page.mark("figures-drawn")
    assert page.texts("#title") == [name]
    assert page.texts("figcaption")[0] == "Accuracy, greedy, a[U+202E]b, pass@1"
    for place, text in enumerate(HOSTILE[:3]):
        page.find(f"#contexts li:nth-child({place + 1})").click()
        assert page.texts("#context") == [text + text]  # context and reference
        assert all(text in words for words in page.texts("#completions .words"))
    page.find("#contexts li:nth-child(4)").click()
    assert page.texts("#context mark") == ["bell\u2407 escape\u241b[31m null\u2400 return\u240d next[U+0085]"]
    page.find("#contexts li:nth-child(5)").click()
    assert "turned [U+202E]gnihtyna[U+202C], joined \U0001f469\u200d\U0001f4bb" in page.texts("#context mark")[0]
    page.find("#contexts li:nth-child(6)").click()
    assert page.texts("#context mark") == ["x" * 5000]
    assert page.ask("document.documentElement.scrollWidth <= innerWidth")
    assert "<script>window.hacked = 3</script> [U+D800]" in page.texts("#results th")
    assert page.ask("window.hacked === undefined && document.querySelectorAll('main img').length === 0")
    assert page.errors() == [] and page.fetched() == []


def test_markup_that_got_in_would_not_run(opened):
    opened.mark("viewer-usable")
    opened.ask("document.body.insertAdjacentHTML('beforeend', arguments[0])", "<img src=x onerror='window.hacked=1'>")
    opened.wait("document.body.lastElementChild.complete")
    assert opened.ask("window.hacked === undefined")
    assert any("Content Security Policy" in message for message in opened.errors())


@pytest.mark.parametrize("width", [360, 800])
def test_narrow_screens_need_no_sideways_scrolling(browser, comparison, width):
    metrics = {"width": width, "height": 780, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = Page(browser, comparison)
        page.mark("figures-drawn")
        assert page.ask("document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_scheme(browser, comparison):
    feature = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    try:
        page = Page(browser, comparison)
        page.mark("figures-drawn")
        ground, text = (page.ask(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
        assert ground == "rgb(19, 20, 23)" and text == "rgb(232, 232, 228)"
        dark = page.ask("document.querySelector('.plot').layout.font.color")
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        page.wait(f"document.querySelector('.plot').layout.font.color !== '{dark}'")  # redrawn, not only restyled
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_ten_thousand_rollouts_open_quickly(browser, tmp_path):
    path = write_report([make_run(tmp_path / "run", contexts=625)])
    times = []
    for _ in range(3):
        page = Page(browser, path)
        times.append(page.mark("viewer-usable"))
    assert page.ask("data.steps.reduce((sum, step) => sum + step.kept, 0)") == 2500  # of 4 rollouts each
    assert len(page.texts("#contexts li")) == 625
    print(f"{path.stat().st_size / 1e6:.1f} MB, usable after {sorted(times)} ms")
    assert min(times) < 2000
