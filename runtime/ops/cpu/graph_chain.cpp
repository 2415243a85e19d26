// Runs the compiled graphs of a model's layers one after the other in a single call: each takes what the one before
// returned, the step's metadata, and tensors of its own (its weights, its KV cache).
#include <vector>

#include "shim_util.h"

namespace xllm {
namespace {

using Handle = AtenTensorHandle;
// AOTInductorModelContainerRun of a graph's library: takes over the inputs' handles and gives the outputs'.
using RunGraph = int32_t (*)(void* container, Handle* inputs, size_t num_inputs, Handle* outputs, size_t num_outputs,
                             void* stream, void* proxy);

void append_copies(std::vector<Handle>& to, const Handle* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Handle copy = nullptr;
    check_shim(aoti_torch_new_tensor_handle(from[i], &copy), "aoti_torch_new_tensor_handle");
    to.push_back(copy);
  }
}

}  // namespace
}  // namespace xllm

// state [num_state]: handles that stay the caller's; results [num_state]: handles that become the caller's.
// own: the graphs' own tensors one after the other, those of graph i in [own_at[i], own_at[i + 1]).
// Returns the number of graphs that ran: num_graphs, or the index of the one that failed.
XLLM_EXPORT int64_t xllm_run_chain(int64_t num_graphs, const xllm::RunGraph* graphs, void* const* containers,
                                   const xllm::Handle* own, const int64_t* own_at, int64_t num_state,
                                   const xllm::Handle* state, int64_t num_metadata, const xllm::Handle* metadata,
                                   xllm::Handle* results) {
  using namespace xllm;
  std::vector<Handle> inputs, outputs;
  int64_t at = 0;
  const AOTITorchError error = run("graph_chain", [&] {
    append_copies(outputs, state, num_state);
    for (; at < num_graphs; ++at) {
      inputs.swap(outputs);
      append_copies(inputs, metadata, num_metadata);
      append_copies(inputs, own + own_at[at], own_at[at + 1] - own_at[at]);
      outputs.assign(size_t(num_state), nullptr);
      const int32_t failed = graphs[at](containers[at], inputs.data(), inputs.size(), outputs.data(), outputs.size(),
                                        nullptr, nullptr);
      inputs.clear();
      check(failed == 0, "graph %lld failed", static_cast<long long>(at));
    }
  });
  if (error == AOTI_TORCH_SUCCESS) {
    std::copy(outputs.begin(), outputs.end(), results);
  }
  return at;
}
