"""deploy/grafana/xllm.json asks only for metrics that servers expose."""

import json
import re
from pathlib import Path

import pytest

from tests.scheduler.metric_families import busy_metrics, families
from xllm_compile.scheduler.cluster.cluster import Cluster

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana/xllm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


async def test_every_expression_names_what_is_exposed():
    exposed: set[str] = set()
    for family in families(busy_metrics(Cluster())):
        exposed |= {sample.name for sample in family.samples} | {family.name}
    texts = [target["expr"] for panel in PANELS for target in panel["targets"]]
    texts += [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    for text in texts:
        asked = set(re.findall(r"\bxllm_\w+", text))
        assert asked and asked <= exposed, text
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}"), text


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_panels_have_units_and_a_place(panel):
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert set(panel["gridPos"]) == {"x", "y", "w", "h"}
    assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert panel["datasource"]["uid"] == "${datasource}"


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
