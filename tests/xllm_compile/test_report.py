"""The report page: what it must say, and that nothing in it is fetched from elsewhere."""

import re
from xml.etree import ElementTree

import pytest

from tests.graph_passes.regions import region_graph
from xllm_compile.graph_passes.region import PassReport
from xllm_compile.report import BucketReport, RegionReport, ReportPage, write_report
from xllm_compile.report.charts import Block, Span, histogram_chart, memory_chart, timeline_chart

REPORTS = (
    PassReport(name="first", region="layer", skips={"odd <size>": 2}, ops_before={"a": 3}, ops_after={"a": 3}),
    PassReport(
        name="second", region="layer", matches=1, ops_before={"a": 3}, ops_after={"b": 1}, program="x = b()\nreturn x"
    ),
)


@pytest.fixture
def page(tmp_path):
    graph = region_graph(lambda inputs, _: (inputs["x"] + 1,), {"x": ("T", 4)})
    region = RegionReport(
        region="layer",
        layers=(0, 1, 2),
        passes=REPORTS,
        ops_before={"a": 3},
        ops_after={"b": 1},
        captured="x = a()\nreturn x",
        final="x = b()\nreturn x",
        graph=graph,
        unlowered=graph,
        lifetimes=(),
    )
    spans = (
        Span(name="linear", lane="cube", start=0.0, end=2e-6),
        Span(name="norm", lane="vector", start=1e-6, end=3e-6),
    )
    blocks = (
        Block(name="q", offset=0, size=64, first=0, last=2),
        Block(name="k", offset=64, size=32, first=1, last=1),
    )
    write_report(
        tmp_path / "index.html",
        ReportPage(
            title="Tiny & small",
            facts={"target": "cpu"},
            regions=[region],
            buckets=BucketReport(tokens=(1, 512), logits=(1,), reason="given", histogram={1: 3.0, 300: 1.0}),
            timelines=[("layer", spans)],
            memory=[("layer-T1", blocks)],
            pool_bytes=1200,
        ),
    )
    return (tmp_path / "index.html").read_text()


def test_the_page_says_what_happened_and_is_escaped(page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "Tiny &amp; small" in text
    assert "odd &lt;size&gt;: 2" in text
    assert "3 &rarr; 1" in text
    assert "Runs 3 times per step" in text
    assert "one pool of 1,200 bytes" in text
    assert "alone needs 96," in text


def test_a_pass_shows_the_lines_it_changed_and_others_none(page):
    assert re.findall(r"what (\w+) changed", page) == ["second"]
    assert '<span class="del">-x = a()</span>' in page
    assert '<span class="add">+x = b()</span>' in page


def test_the_page_fetches_nothing(page):
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "url(" not in page
    assert "@import" not in page


def rectangles(svg):
    return [
        {key: float(node.get(key, "nan")) for key in ("x", "y", "width", "height")}
        for node in ElementTree.fromstring(svg).iter("rect")
    ]


def test_blocks_alive_together_do_not_overlap_and_keep_their_proportions():
    big, small = rectangles(
        memory_chart(
            [
                Block(name="q", offset=0, size=64, first=0, last=2),
                Block(name="k", offset=64, size=32, first=1, last=1),
            ]
        )
    )
    assert small["y"] + small["height"] == pytest.approx(big["y"], abs=0.2)
    assert big["height"] == pytest.approx(2 * small["height"], abs=0.2)
    assert big["width"] == pytest.approx(3 * small["width"], abs=0.2)


def test_a_lane_is_a_row_and_time_runs_to_the_right():
    spans = [
        Span(name="linear", lane="cube", start=0.0, end=2e-6),
        Span(name="norm", lane="vector", start=2e-6, end=3e-6),
    ]
    first, second = rectangles(timeline_chart(spans))
    assert first["y"] != second["y"]
    assert second["x"] == pytest.approx(first["x"] + first["width"], abs=0.1)
    assert first["width"] == pytest.approx(2 * second["width"], abs=0.1)
    assert ">67%<" in timeline_chart(spans)


def test_the_name_of_a_lane_ends_before_its_share_begins():
    lane, share = [
        node
        for node in ElementTree.fromstring(
            timeline_chart([Span(name="sum", lane="communication main", start=0.0, end=1.0)])
        ).iter("text")
        if node.get("y") == "20"
    ]
    # Of this size most letters are less wide.
    letter = 7
    lane_end = float(lane.attrib["x"]) + letter * len("communication main")
    assert lane_end < float(share.attrib["x"]) - letter * len("100%")
    assert (lane.text, share.text) == ("communication main", "100%")


def test_the_histogram_has_a_bar_for_every_size_and_a_line_for_every_bucket():
    svg = histogram_chart({1: 1.0, 2: 1.0, 400: 2.0}, (1, 8, 512))
    assert len(rectangles(svg)) == 3
    tallest = max(rectangles(svg), key=lambda bar: bar["height"])
    assert tallest["x"] == max(bar["x"] for bar in rectangles(svg))
    assert [node.text for node in ElementTree.fromstring(svg).iter("text")] == ["1", "8", "512"]
