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

// The arrays of runtime/step.py, padded as the graphs want them: int32 token_ids, positions and rope_len [num_tokens],
// seq_start [num_seqs + 1], context_len and slot [num_seqs], logits_at [num_rows], each begun at a multiple of 16 numbers.
struct PackedStep {
  int32_t* token_ids;
  int64_t num_tokens, num_seqs, num_rows;

  int32_t* positions() const { return token_ids + padded(num_tokens); }
  int32_t* rope_len() const { return positions() + padded(num_tokens); }
  int32_t* seq_start() const { return rope_len() + padded(num_tokens); }
  int32_t* context_len() const { return seq_start() + padded(num_seqs + 1); }
  int32_t* slot() const { return context_len() + padded(num_seqs); }
  int32_t* logits_at() const { return slot() + padded(num_seqs); }
  static int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }
};

// The tensors of a step, over its memory.
struct StepTensors : Handles {
  explicit StepTensors(const PackedStep& step) {
    add(step.token_ids, step.num_tokens);
    add(step.positions(), step.num_tokens);
    add(step.rope_len(), step.num_tokens);
    add(step.seq_start(), step.num_seqs + 1);
    add(step.context_len(), step.num_seqs);
    add(step.slot(), step.num_seqs);
    add(step.logits_at(), step.num_rows);
  }
  void add(int32_t* data, int64_t size) {
    const int64_t stride = 1;
    Handle made = nullptr;
    check_shim(aoti_torch_create_tensor_from_blob(data, 1, &size, &stride, 0, aoti_torch_dtype_int32(),
                                                  aoti_torch_device_type_cpu(), 0, &made),
               "aoti_torch_create_tensor_from_blob");
    push_back(made);
  }
};

// The head's output for a step: graphs are embed, the layers and the head.
void run_step(const Graphs& graphs, int64_t num_state, const StepTensors& step, Handles& state) {
  run_graph(graphs, 0, step.data(), 3, num_state + 2, state);
  Handles rope;
  rope.assign(state.end() - 2, state.end());
  state.resize(size_t(num_state));
  const Handle metadata[] = {rope[0], rope[1], step[1], step[3], step[4], step[5]};
  for (int64_t at = 1; at < graphs.count - 1; ++at) run_graph(graphs, at, metadata, 6, num_state, state);
  run_graph(graphs, graphs.count - 1, step.data() + 6, 1, 1, state);
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

// The graphs are embed, the layers and the head. *logits becomes the caller's. Returns 0, or not.
XLLM_EXPORT int32_t xllm_run_step(int64_t num_graphs, const xllm::RunGraph* runs, void* const* containers,
                                  const xllm::Handle* own, const int64_t* own_at, int64_t num_state, int32_t* step,
                                  int64_t num_tokens, int64_t num_seqs, int64_t num_rows, xllm::Handle* logits) {
  using namespace xllm;
  return run("step", [&] {
    const StepTensors tensors(PackedStep{step, num_tokens, num_seqs, num_rows});
    Handles state;
    run_step(Graphs{num_graphs, runs, containers, own, own_at}, num_state, tensors, state);
    *logits = state[0];
    state.clear();
  });
}

// The step has one token of each of its first num_decoding sequences, whose entries go on with the steps.
// chosen [num_steps, num_decoding] is what each step found most probable. Returns the number of steps that ran.
XLLM_EXPORT int64_t xllm_decode_greedily(int64_t num_graphs, const xllm::RunGraph* runs, void* const* containers,
                                         const xllm::Handle* own, const int64_t* own_at, int64_t num_state,
                                         int32_t* step, int64_t num_tokens, int64_t num_seqs, int64_t num_rows,
                                         int64_t num_decoding, int64_t num_steps, int32_t* chosen) {
  using namespace xllm;
  const Graphs graphs{num_graphs, runs, containers, own, own_at};
  const PackedStep packed{step, num_tokens, num_seqs, num_rows};
  int64_t done = 0;
  run("decode_greedily", [&] {
    const StepTensors tensors(packed);
    for (; done < num_steps; ++done, chosen += num_decoding) {
      Handles state;
      run_step(graphs, num_state, tensors, state);
      const View logits("logits", state[0]);
      logits.expect_dim(2).expect_dtype(aoti_torch_dtype_float32()).expect_last_contiguous();
      for (int64_t s = 0; s < num_decoding; ++s) {
        packed.token_ids[s] = chosen[s] = argmax(logits.ptr<float>() + s * logits.strides[0], logits.sizes[1]);
        packed.context_len()[s] = ++packed.positions()[s] + 1;
        packed.rope_len()[s] = std::max(packed.rope_len()[s], packed.context_len()[s]);
      }
    }
  });
  return done;
}
