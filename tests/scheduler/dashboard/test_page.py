"""The page in a real browser: what it shows of real traffic."""

import os
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.scheduler.cluster.test_cluster_client import generate
from tests.scheduler.dashboard.conftest import make_dashboard
from tests.scheduler.service_fixtures import MAX_MODEL_LEN
from xllm_compile.scheduler.dashboard import dashboard as dashboard_module
from xllm_compile.scheduler.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed: pip install playwright")

# What the browser itself says of the key's refusal, and of a test's server that ended before its page.
EXPECTED = ("status of 401", "ERR_CONNECTION_REFUSED")

# What a chart writes outside of itself, which nobody sees.
CUT_OFF = """[...document.querySelectorAll(".plot text")].filter((text) => {
  const inner = text.getBoundingClientRect(), outer = text.closest(".plot").getBoundingClientRect();
  return inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1 || inner.right > outer.right + 1;
}).map((text) => text.textContent)"""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]


def is_error(message: Any) -> bool:
    return message.type == "error" and not any(text in message.text for text in EXPECTED)


def is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:"))


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    """A tab; the test fails on an error in its console and on a request to anybody but the server."""
    # Chromium refuses its sandbox to root.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=args)
        tab = await browser.new_page(viewport={"width": 1280, "height": 800})
        problems: list[str] = []
        tab.on("console", lambda message: problems.append(message.text) if is_error(message) else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: problems.append(request.url) if is_foreign(request.url) else None)
        yield tab
        await browser.close()
    assert problems == []


async def wide(page: Any) -> int:
    """Pixels by which the page is wider than the window."""
    return await page.evaluate("document.documentElement.scrollWidth - innerWidth")


async def test_a_gateway_with_traffic(make_cluster, serve, page):
    cluster = await make_cluster(a={}, b={})
    service = cluster.instances["a"].service
    dashboard = make_dashboard(service, cluster.cluster)
    dashboard.take()
    await generate(cluster)
    await cluster.until(
        lambda: sum(each.load.counters.num_generated_tokens for each in cluster.cluster.instances()) > 0
    )
    dashboard.take()
    async with serve(service, dashboard) as address:
        await page.goto(f"{address}/dashboard")
        await page.wait_for_selector("#status[data-state=live]")
        assert await page.title() == "counter - xllm-compile"
        assert await page.inner_text("#subtitle") == "gateway, xllm-compile 1.2.3"
        strips = page.locator(".strip")
        assert await strips.count() == 2
        assert [await each.get_attribute("data-instance") for each in await strips.all()] == ["a", "b"]
        for at in range(2):
            assert await strips.nth(at).locator("rect[data-pool=mix][data-health=active]").count() == 1
        titles = ("Requests that ended", "Hand-overs from prefill to decode", "KV sent between instances", "Failover")
        for title in titles:
            assert await page.locator(".chart", has_text=title).locator(".plot > *").count() > 0
        tokens = page.locator(".chart", has_text="Tokens per second")
        assert await tokens.locator("path.line").count() == 2
        assert await page.locator("[data-tile=Instances] .value").inner_text() == "2"
        assert await page.locator("[data-tile=Instances] .note").inner_text() == "all answer"
        assert await page.locator("[data-tile='TTFT, 95 %'] .note").inner_text() == "target 200 ms"
        assert await page.locator(".plot text", has_text=re.compile("^target ")).count() == 2
        assert await page.evaluate(CUT_OFF) == []
        assert "no instance was lost" in await page.locator(".chart", has_text="Failover").inner_text()
        assert await page.locator("#no-instance").is_hidden()
        assert await wide(page) == 0
        await page.set_viewport_size({"width": 390, "height": 844})
        assert await wide(page) == 0


async def test_a_lost_instance_is_marked(make_cluster, serve, page):
    cluster = await make_cluster(a={}, b={})
    service = cluster.instances["a"].service
    dashboard = make_dashboard(service, cluster.cluster)
    dashboard.take()
    await cluster.instances["b"].stop()
    await cluster.until(lambda: any(each.health == "suspect" for each in cluster.cluster.instances()))
    dashboard.take()
    async with serve(service, dashboard) as address:
        await page.goto(f"{address}/dashboard")
        await page.wait_for_selector(".strip[data-instance=b] rect[data-health=suspect]", state="attached")
        assert await page.locator("[data-tile=Instances] .note").inner_text() == "1 suspect"
        assert "suspect" in await page.inner_text("#strip-legend")
        # Of the two only one still has room: 1024 tokens each.
        assert await page.locator("[data-tile='KV in use'] .note").inner_text() == "0 of 1.02k"


async def test_no_instance(make_cluster, serve, page):
    cluster = await make_cluster()
    service = (await make_cluster(a={})).instances["a"].service
    dashboard = make_dashboard(service, cluster.cluster)
    dashboard.take()
    async with serve(service, dashboard) as address:
        await page.goto(f"{address}/dashboard")
        await page.wait_for_selector("#no-instance:visible")
        assert "Instances appear here as they register" in await page.inner_text("#no-instance")
        assert await page.locator(".strip").count() == 0


async def test_it_goes_on_while_it_is_looked_at(service, serve, page, monkeypatch):
    monkeypatch.setattr(dashboard_module, "PERIOD_S", 0.05)
    dashboard = make_dashboard(service)
    dashboard.take()
    async with serve(service, dashboard) as address:
        await page.goto(f"{address}/dashboard")
        await page.wait_for_selector("#status[data-state=live]")
        assert await page.inner_text("#instances-title") == "Models"
        async for _ in service.generate("r", list(b"abc"), _params()):
            pass
        dashboard.take()
        await page.wait_for_selector(".chart:has-text('Time to first token') path.line", state="attached")
        value = await page.locator("[data-tile='TTFT, 95 %'] .value").inner_text()
        assert value[0].isdigit()
        # Who comes later sees the past.
        await page.reload()
        await page.wait_for_selector(".chart:has-text('Time to first token') path.line", state="attached")
        box = await page.locator("[data-instance=counter] svg").bounding_box()
        await page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
        assert "counter: mix, active" in await page.inner_text("#tooltip")
        await page.click("#theme")
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"


async def test_it_asks_for_the_key_once(engine, serve, page):
    service = Service(
        engine=engine,
        tokenizer=engine.engine.tokenizer,
        model_names=("counter",),
        max_model_len=MAX_MODEL_LEN,
        version="1",
        api_keys=("secret",),
    )
    dashboard = make_dashboard(service)
    dashboard.take()
    async with serve(service, dashboard) as address:
        await page.goto(f"{address}/dashboard")
        await page.fill("#key-input", "wrong")
        await page.click("#key button")
        await page.wait_for_selector("#key-error:visible")
        await page.fill("#key-input", "secret")
        await page.click("#key button")
        await page.wait_for_selector("#status[data-state=live]")
        await page.reload()
        await page.wait_for_selector("#status[data-state=live]")
        assert await page.locator("#key").is_hidden()


async def test_a_name_cannot_bring_markup(engine, serve, page):
    name = "<img src=x onerror=alert(1)>"
    service = Service(
        engine=engine,
        tokenizer=engine.engine.tokenizer,
        model_names=(name,),
        max_model_len=MAX_MODEL_LEN,
        version="1",
    )
    dashboard = make_dashboard(service)
    dashboard.take()
    async with serve(service, dashboard) as address:
        await page.goto(f"{address}/dashboard")
        await page.wait_for_selector(".strip")
        assert await page.inner_text(".strip .name") == name
        assert await page.locator("img").count() == 0


def _params():
    from xllm_compile.runtime.sampling_params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
