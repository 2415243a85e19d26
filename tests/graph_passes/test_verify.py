"""Each clause of the graph specification, broken on purpose."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from tests.graph_passes.regions import family_config, layer_graph, region_graph
from xllm_compile.graph_passes.region import insert_call
from xllm_compile.graph_passes.verify import GraphVerificationError, verify_graph


@pytest.fixture
def layer():
    region = layer_graph(family_config("qwen3"))
    verify_graph(region, after="capture")
    return region


def refused(region, match):
    with pytest.raises(GraphVerificationError, match=match) as error:
        verify_graph(region, after="some_pass")
    assert f"{region.name} after some_pass" in str(error.value)


def find(region, target) -> fx.Node:
    return next(iter(region.graph.find_nodes(op="call_function", target=target)))


def test_a_value_that_is_unknown(layer):
    del find(layer, torch.ops.aten.linear.default).meta["val"]
    refused(layer, "linear")


def test_a_value_of_another_shape(layer):
    node = find(layer, torch.ops.aten.silu.default)
    node.meta["val"] = node.meta["val"][:, 1:]
    refused(layer, "silu")


def test_a_value_of_another_dtype(layer):
    node = find(layer, torch.ops.xllm.attention.default)
    node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    refused(layer, "attention")


def test_a_weight_that_is_not_what_its_spec_says(layer):
    name = next(iter(layer.weights))
    layer.weights[name] = replace(layer.weights[name], shape=(3,))
    refused(layer, name)


def test_a_weight_too_many(layer):
    name = next(iter(layer.weights))
    layer.weights["w_other"] = layer.weights[name]
    refused(layer, "placeholders")


def test_inputs_in_another_order(layer):
    layer.inputs = tuple(reversed(layer.inputs))
    refused(layer, "placeholders")


def test_attention_before_the_write(layer):
    attention = find(layer, torch.ops.xllm.attention.default)
    write = find(layer, torch.ops.xllm.kv_write.default)
    attention.append(write)
    refused(layer, "before it is written")


def test_a_second_write(layer):
    write = find(layer, torch.ops.xllm.kv_write.default)
    with layer.graph.inserting_after(write):
        again = layer.graph.call_function(write.target, write.args)
    again.meta["val"] = None
    refused(layer, "second time")


def test_an_output_that_is_an_input():
    region = region_graph(lambda inputs, weights: (inputs["x"] + 1,), {"x": ("T", 6)})
    region.graph.output_node().args = ((region.placeholder("x"),),)
    refused(region, "is an input")


def test_an_output_that_is_a_view_of_an_input():
    region = region_graph(lambda inputs, weights: (inputs["x"].view(-1, 3) + 1,), {"x": ("T", 6)})
    view = find(region, torch.ops.aten.view.default)
    region.graph.output_node().args = ((view,),)
    refused(region, "view of the input x")


def test_a_cache_written_through_a_view(layer):
    write = find(layer, torch.ops.xllm.kv_write.default)
    cache = layer.placeholder("kv_cache")
    view = insert_call(layer.graph, write, torch.ops.aten.slice.Tensor, cache, 0, 0, 4)
    write.replace_input_with(cache, view)
    refused(layer, "no input of the region")
