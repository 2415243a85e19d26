"""What splitting a step in halves is predicted to hide."""

import pytest

from xllm_compile.graph_passes.overlap import Part, steady_seconds

# A layer of one half: two parts that end in a sum, and what runs on into the next layer.
PARTS = [Part(compute_s=2.0, link_s=1.0), Part(compute_s=2.0, link_s=1.0), Part(compute_s=0.0, link_s=0.0)]


def test_sums_shorter_than_the_other_half_are_hidden():
    assert steady_seconds([PARTS, PARTS]) == pytest.approx(8.0)


def test_where_graphs_end_with_their_sums_the_last_one_shows():
    assert steady_seconds([PARTS, PARTS], sums_leave_region=False) == pytest.approx(9.0)


def test_a_link_that_is_always_at_work_is_what_counts():
    slow = [Part(compute_s=1.0, link_s=3.0), Part(compute_s=1.0, link_s=3.0), Part(compute_s=0.0, link_s=0.0)]
    assert steady_seconds([slow, slow]) == pytest.approx(12.0)
