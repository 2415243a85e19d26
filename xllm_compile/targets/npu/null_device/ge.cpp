// A null Ascend device, the graph engine half: a graph is the serialised model it was loaded from, and saving it writes
// those bytes. Declarations are our own; only the mangled names and the shared_ptr in first place matter to callers.
// Functions that are not here are trampolines made by build.py. torch_npu is built with the old string ABI.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>

namespace ge {

class AscendString {
 public:
  AscendString(const char *text);
  const char *GetString() const;
  bool operator<(const AscendString &other) const;
  bool operator==(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> text_;
};

AscendString::AscendString(const char *text) : text_(std::make_shared<std::string>(text ? text : "")) {}
const char *AscendString::GetString() const { return text_ ? text_->c_str() : ""; }
bool AscendString::operator<(const AscendString &other) const { return std::strcmp(GetString(), other.GetString()) < 0; }
bool AscendString::operator==(const AscendString &other) const {
  return std::strcmp(GetString(), other.GetString()) == 0;
}

class Graph {
 public:
  explicit Graph(const char *name);
  int CopyFrom(const Graph &other);
  int LoadFromSerializedModelArray(const void *bytes, size_t num_bytes);
  int SaveToFile(const char *path) const;

 private:
  std::shared_ptr<std::string> model_;
};

Graph::Graph(const char *) : model_(std::make_shared<std::string>()) {}

int Graph::CopyFrom(const Graph &other) {
  model_ = other.model_;
  return 0;
}

int Graph::LoadFromSerializedModelArray(const void *bytes, size_t num_bytes) {
  model_ = std::make_shared<std::string>(static_cast<const char *>(bytes), num_bytes);
  return 0;
}

int Graph::SaveToFile(const char *path) const {
  FILE *file = std::fopen(path, "wb");
  if (!file) return 1;
  const bool is_written = std::fwrite(model_->data(), 1, model_->size(), file) == model_->size();
  return std::fclose(file) == 0 && is_written ? 0 : 1;
}

AscendString GEGetWarningMsgV2() { return AscendString(""); }

class OperatorFactory {
 public:
  static bool IsExistOp(const char *type);
};

// Which operators the installed CANN has cannot be known here: TorchAir is told that it has them all.
bool OperatorFactory::IsExistOp(const char *) { return true; }

}  // namespace ge
