from xml.etree import ElementTree

from xllm_compile.benchmarks.simulation.chart import attainment_chart, page, timeline_chart


def test_charts_are_svg_with_a_line_for_each_series():
    curves = {"a < b": [(1.0, 1.0), (8.0, 0.5)], "ours": [(2.0, 1.0), (4.0, 0.9)]}
    rates = attainment_chart("targets", curves, 0.9)
    times = timeline_chart("roles", [(0.0, 4, 4), (10.0, 6, 2)], 60.0)
    for chart, num_lines in ((rates, 3), (times, 2)):
        found = ElementTree.fromstring(chart)
        assert sum(node.tag.endswith("polyline") for node in found) == num_lines
    assert "a &lt; b" in rates
    assert page([rates, times]).count("<svg") == 2
