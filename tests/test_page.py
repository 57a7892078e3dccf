"""The page in a real browser against a real pool: what streams, what is tinted, what it shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from browser import Browser
from pools import PROMPTS, reference_tokens
from selenium.webdriver.common.keys import Keys
from serving import Endpoint, count_sessions, open_endpoint

from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 120
ALL_TOKENS = ".assistant:last-child .token"


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    settings = PoolSettings(workers=2, model=DEMO_TEXT_MODEL, image_model=DEMO_IMAGE_MODEL)
    with LocalPool(settings) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Endpoint]:
    with open_endpoint(pool, demo_ends, image_model=find_model(DEMO_IMAGE_MODEL)) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture
def page(browser: Browser, endpoint: Endpoint) -> Iterator[Browser]:
    browser.open(endpoint.url)
    browser.wait_for(lambda: browser.find_all("#messages .empty"))
    yield browser
    assert browser.complaints() == []


def set_value(page: Browser, selector: str, value: str) -> None:
    page.run("document.querySelector(arguments[0]).value = arguments[1]", selector, value)


def ask(page: Browser, text: str, tokens: int) -> None:
    set_value(page, "#temperature", "0")
    set_value(page, "#max-tokens", str(tokens))
    page.find("#prompt").send_keys(text, Keys.ENTER)


def wait_for_the_end(page: Browser) -> None:
    page.wait_for(lambda: page.find_all(".assistant") and not page.find_all(".writing"))


def read_answer(page: Browser) -> str:
    return str(page.run("return [...document.querySelectorAll('.assistant')].at(-1).textContent"))


def workers_of(page: Browser) -> list[str]:
    """Who computed each token of the last answer."""
    script = "return [...document.querySelectorAll(arguments[0])].map((t) => t.dataset.worker)"
    return list(page.run(script, ALL_TOKENS))


def reference(whole_model: torch.nn.Module, demo_ends: ModelEnds, prompt: str, count: int) -> str:
    tokenizer = TextTokenizer(demo_ends.directory)
    return tokenizer.decode(reference_tokens(whole_model, tokenizer, [prompt], count)[0])


def test_an_answer_streams_and_its_tint_changes_when_its_worker_is_killed(
    page: Browser,
    pool: LocalPool,
    demo_ends: ModelEnds,
    whole_model: torch.nn.Module,
) -> None:
    prompt = PROMPTS[7]
    ask(page, prompt, COUNT)
    page.wait_for(lambda: len(page.find_all(ALL_TOKENS)) > 10)
    assert page.find_all(".writing")
    first = workers_of(page)[0]
    pool.kill_worker(first)
    wait_for_the_end(page)
    pool.start_worker()
    assert read_answer(page) == reference(whole_model, demo_ends, prompt, COUNT)
    workers = workers_of(page)
    assert set(workers) == {first, *pool.workers} - {"w3"}
    assert workers == sorted(workers, key=lambda worker: worker != first)  # once, and for good
    tints = page.run(
        "return [...document.querySelectorAll(arguments[0])].map((t) => t.style.background)",
        ALL_TOKENS,
    )
    assert len(set(tints)) == 2
    shown = page.find("#workers-of-answer").text
    assert all(worker in shown for worker in set(workers))
    pool.wait_for_workers(2)


def test_what_a_token_cost_is_shown_where_one_points_and_with_the_keyboard(page: Browser) -> None:
    ask(page, PROMPTS[1], 12)
    wait_for_the_end(page)
    tip = page.find("#tip")
    assert not tip.is_displayed()
    page.find(".assistant").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert tip.is_displayed()
    assert "computed by w" in tip.text
    assert " up, " in tip.text
    assert "network" in tip.text
    page.find("#prompt").click()
    assert not tip.is_displayed()
    sent = page.find("#bytes").text
    assert "int8" not in sent
    assert "fp32" in sent
    assert page.find("#path svg").text.count("ms") >= 3


def test_a_second_turn_goes_on_and_a_new_chat_begins_anew(
    page: Browser, demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    ask(page, PROMPTS[2], 8)
    wait_for_the_end(page)
    first = read_answer(page)
    ask(page, "Then it rained.", 8)
    page.wait_for(lambda: len(page.find_all(".assistant")) == 2)
    wait_for_the_end(page)
    assert read_answer(page) != first
    page.find("#new-chat").click()
    assert page.find_all("#messages li.user") == []
    ask(page, PROMPTS[2], 8)
    wait_for_the_end(page)
    assert read_answer(page) == reference(whole_model, demo_ends, PROMPTS[2], 8) == first


def test_an_answer_without_any_text_says_so(page: Browser) -> None:
    for turn in range(3):  # the demo model is at its story's end after two
        ask(page, "The end.", 400)
        page.wait_for(lambda wanted=turn + 1: len(page.find_all(".assistant")) == wanted)
        wait_for_the_end(page)
    assert page.find(".assistant:last-child").text == "The model ended its answer at once."


def test_stop_ends_an_answer_and_what_the_pool_held_for_it(page: Browser, pool: LocalPool) -> None:
    ask(page, PROMPTS[3], 400)
    page.wait_for(lambda: len(page.find_all(ALL_TOKENS)) > 5)
    page.find("#stop").click()
    wait_for_the_end(page)
    assert len(page.find_all(ALL_TOKENS)) > 5
    assert "The end" not in read_answer(page)
    assert page.find("#send").is_displayed()
    assert count_sessions(pool) <= 16  # kept for a next turn, at most so many


def test_an_error_is_said_where_the_answer_would_be(page: Browser) -> None:
    ask(page, "word " * 600, 8)
    wait_for_the_end(page)
    assert "has a context of 512" in page.find(".assistant .error").text
    assert page.find("#send").is_displayed()
    page.complaints()  # of the 400 that this was about


def test_a_picture_grows_beside_what_travelled(page: Browser) -> None:
    page.find("#tab-image").click()
    set_value(page, "#steps", "8")
    page.find("#image-prompt").send_keys("a red house on a green hill under a blue sky")
    page.find("#paint-it").click()
    seen: set[str] = set()

    def is_done() -> bool:
        seen.add(page.find("#picture").get_attribute("src") or "")
        return page.find("#picture-caption").text.startswith("Done, seed ")

    page.wait_for(is_done)
    assert len(seen) > 2
    for picture in ("#picture", "#travelled"):
        loaded = (
            "const i = document.querySelector(arguments[0]); return [i.complete, i.naturalWidth]"
        )
        is_complete, width = page.run(loaded, picture)
        assert is_complete
        assert width >= 64
    assert "8 of 8" in page.find("#image-bytes").text


def test_the_pool_tab_is_what_the_broker_says(page: Browser, pool: LocalPool) -> None:
    page.find("#tab-pool").click()
    page.wait_for(lambda: len(page.find_all("#workers tbody tr")) == 2)
    client = pool.connect()
    report = client.status()
    client.close()
    # in one go: the page draws its rows anew at each report
    rows = page.run(
        "return Object.fromEntries([...document.querySelectorAll('#workers tbody tr')]"
        ".map(row => [row.querySelector('td').innerText, row.innerText]))"
    )
    assert set(rows) == {worker["worker_id"] for worker in report["workers"]}
    assert all("ready" in row and "stories-llama 2-6" in row for row in rows.values())
    figures = page.find("#pool-figures").text.splitlines()
    shown = dict(zip(figures[::2], figures[1::2], strict=True))
    assert shown["workers lost"] == str(report["counters"]["dead_workers"])
    assert shown["steps answered"].replace(",", "") == str(report["counters"]["answers"])
    assert shown["Redis"] == "up"
    assert "landscapes-sdxl" in page.find("#queues").text
    assert "layers 0–2, 6–8" in page.find("#pool-path").get_attribute("textContent")


def test_tabs_are_walked_with_arrow_keys(page: Browser) -> None:
    page.find("#tab-chat").send_keys(Keys.ARROW_LEFT)
    assert page.find("#pool").is_displayed()
    assert page.run("return document.activeElement.id") == "tab-pool"
    page.find("#tab-pool").send_keys(Keys.ARROW_RIGHT)
    assert page.find("#chat").is_displayed()
    assert not page.find("#pool").is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_everything_fits_in_light_and_dark(
    browser: Browser, endpoint: Endpoint, width: int, height: int, scheme: str
) -> None:
    browser.open(endpoint.url, width, height, scheme)
    browser.wait_for(lambda: browser.find_all("#messages .empty"))
    for tab in ("chat", "image", "pool"):
        browser.find(f"#tab-{tab}").click()
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run(f"return document.getElementById('{tab}').scrollWidth") <= width
    dark = "return getComputedStyle(document.body).backgroundColor"
    ground = [int(part) for part in browser.run(dark).strip("rgb()").split(",")]
    assert (max(ground) < 60) == (scheme == "dark")
    browser.find("#theme").click()
    turned = [int(part) for part in browser.run(dark).strip("rgb()").split(",")]
    assert (max(turned) < 60) == (scheme == "light")
    browser.run("localStorage.clear()")


def test_nothing_is_loaded_from_elsewhere(page: Browser, endpoint: Endpoint) -> None:
    loaded = page.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert len(loaded) >= 8
    assert all(name.startswith(endpoint.url) for name in loaded)
    policy = endpoint.http.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")


def test_a_key_is_asked_for_once(pool: LocalPool, demo_ends: ModelEnds, browser: Browser) -> None:
    with open_endpoint(pool, demo_ends, api_keys=["open sesame"]) as guarded:
        browser.open(guarded.url)
        browser.wait_for(lambda: browser.find("#key-form").is_displayed())
        browser.find("#key").send_keys("open sesame", Keys.ENTER)
        browser.wait_for(lambda: "stories-llama" in browser.find("#model").text)
        assert not browser.find("#key-form").is_displayed()
        ask(browser, PROMPTS[0], 4)
        wait_for_the_end(browser)
        assert len(workers_of(browser)) == 4
        assert not browser.find("#tab-image").is_displayed()
    browser.complaints()  # of the 401 that this was about


def test_who_runs_the_pool_can_reconstruct_the_text_and_the_page_says_so(page: Browser) -> None:
    assert "Splitting is not encryption." in page.find("#ask .honest").text
    assert "can reconstruct it" in page.find("#ask .honest").text
