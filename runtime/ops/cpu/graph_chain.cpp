// Runs compiled graphs one after the other in a single call: the layers of a step, a whole step, or decode steps of which
// each goes on with the most probable tokens of the one before.
#include <algorithm>
#include <vector>

#include "shim_util.h"

namespace xllm {
namespace {

using Handle = AtenTensorHandle;
// AOTInductorModelContainerRun of a graph's library: takes over the inputs' handles and gives the outputs'.
using RunGraph = int32_t (*)(void* container, Handle* inputs, size_t num_inputs, Handle* outputs, size_t num_outputs,
                             void* stream, void* proxy);

// Graphs with the tensors that each always gets (its weights, its KV cache): those of graph i are
// own[own_at[i]], ..., own[own_at[i + 1] - 1].
struct Graphs {
  int64_t count;
  const RunGraph* runs;
  void* const* containers;
  const Handle* own;
  const int64_t* own_at;
};

// References to tensors, deleted with it.
struct Handles : std::vector<Handle> {
  ~Handles() { reset(0); }
  void reset(size_t count) {
    for (Handle handle : *this)
      if (handle) aoti_torch_delete_tensor_object(handle);
    assign(count, nullptr);
  }
  void append(Handle tensor) {
    Handle copy = nullptr;
    check_shim(aoti_torch_new_tensor_handle(tensor, &copy), "aoti_torch_new_tensor_handle");
    push_back(copy);
  }
  void append(const Handle* tensors, int64_t count) {
    for (int64_t i = 0; i < count; ++i) append(tensors[i]);
  }
};

// state = graph(*state, *metadata, *own): as many tensors as num_outputs.
void run_graph(const Graphs& graphs, int64_t at, const Handle* metadata, int64_t num_metadata, int64_t num_outputs,
               Handles& state) {
  Handles inputs;
  inputs.swap(state);
  inputs.append(metadata, num_metadata);
  inputs.append(graphs.own + graphs.own_at[at], graphs.own_at[at + 1] - graphs.own_at[at]);
  state.reset(size_t(num_outputs));
  const int32_t failed = graphs.runs[at](graphs.containers[at], inputs.data(), inputs.size(), state.data(),
                                         state.size(), nullptr, nullptr);
  // The graph has them, whatever came of it.
  inputs.clear();
  check(failed == 0, "graph %lld failed", static_cast<long long>(at));
}

// The head's output for a step: graphs are embed, the layers and the head.
void run_step(const Graphs& graphs, int64_t num_state, const Handle* step, Handles& state) {
  run_graph(graphs, 0, step, 3, num_state + 2, state);
  Handles rope;
  rope.assign(state.end() - 2, state.end());
  state.resize(size_t(num_state));
  const Handle metadata[] = {rope[0], rope[1], step[1], step[3], step[4], step[5]};
  for (int64_t at = 1; at < graphs.count - 1; ++at) run_graph(graphs, at, metadata, 6, num_state, state);
  run_graph(graphs, graphs.count - 1, step + 6, 1, 1, state);
}

// The first index of the largest of count numbers; a NaN is never the largest.
int32_t argmax(const float* row, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  vf best = splat(-__builtin_inff());
  for (int64_t i = 0; i < whole; i += kLanes) best = max(best, load(row + i));
  float most = max(best);
  for (int64_t i = whole; i < count; ++i) most = std::max(most, row[i]);
  const float* found = std::find(row, row + count, most);
  return found == row + count ? 0 : int32_t(found - row);
}

}  // namespace
}  // namespace xllm

// state [num_state]: handles that stay the caller's; results [num_state]: handles that become the caller's.
// Graph i gets the state, the metadata and its own tensors.
// Returns the number of graphs that ran: num_graphs, or the index of the one that failed.
XLLM_EXPORT int64_t xllm_run_chain(int64_t num_graphs, const xllm::RunGraph* runs, void* const* containers,
                                   const xllm::Handle* own, const int64_t* own_at, int64_t num_state,
                                   const xllm::Handle* state, int64_t num_metadata, const xllm::Handle* metadata,
                                   xllm::Handle* results) {
  using namespace xllm;
  const Graphs graphs{num_graphs, runs, containers, own, own_at};
  int64_t at = 0;
  run("graph_chain", [&] {
    Handles now;
    now.append(state, num_state);
    for (; at < num_graphs; ++at) run_graph(graphs, at, metadata, num_metadata, num_state, now);
    std::copy(now.begin(), now.end(), results);
    now.clear();
  });
  return at;
}

// The graphs are embed, the layers and the head. step: int32 token_ids, positions, rope_len, seq_start, context_len, slot
// and logits_at of runtime/step.py, which may be padded. *logits becomes the caller's. Returns 0, or not.
XLLM_EXPORT int32_t xllm_run_step(int64_t num_graphs, const xllm::RunGraph* runs, void* const* containers,
                                  const xllm::Handle* own, const int64_t* own_at, int64_t num_state,
                                  const xllm::Handle* step, xllm::Handle* logits) {
  using namespace xllm;
  return run("step", [&] {
    Handles state;
    run_step(Graphs{num_graphs, runs, containers, own, own_at}, num_state, step, state);
    *logits = state[0];
    state.clear();
  });
}

// The step, as of xllm_run_step, has one token of each of num_seqs sequences. Their first num_seqs entries go on with the
// steps. chosen [num_steps, num_seqs] is what each step found most probable. Returns the number of steps that ran.
XLLM_EXPORT int64_t xllm_decode_greedily(int64_t num_graphs, const xllm::RunGraph* runs, void* const* containers,
                                         const xllm::Handle* own, const int64_t* own_at, int64_t num_state,
                                         const xllm::Handle* step, int64_t num_seqs, int64_t num_steps,
                                         int32_t* chosen) {
  using namespace xllm;
  const Graphs graphs{num_graphs, runs, containers, own, own_at};
  int64_t done = 0;
  run("decode_greedily", [&] {
    int32_t* const token_ids = View("token_ids", step[0]).ptr<int32_t>();
    int32_t* const positions = View("positions", step[1]).ptr<int32_t>();
    int32_t* const rope_len = View("rope_len", step[2]).ptr<int32_t>();
    int32_t* const context_len = View("context_len", step[4]).ptr<int32_t>();
    for (; done < num_steps; ++done, chosen += num_seqs) {
      Handles state;
      run_step(graphs, num_state, step, state);
      const View logits("logits", state[0]);
      logits.expect_dim(2).expect_dtype(aoti_torch_dtype_float32()).expect_last_contiguous();
      for (int64_t s = 0; s < num_seqs; ++s) {
        token_ids[s] = chosen[s] = argmax(logits.ptr<float>() + s * logits.strides[0], logits.sizes[1]);
        context_len[s] = ++positions[s] + 1;
        rope_len[s] = std::max(rope_len[s], context_len[s]);
      }
    }
  });
  return done;
}
