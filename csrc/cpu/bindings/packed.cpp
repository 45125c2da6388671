// The bindings of codebooks that a caller keeps packed. fastvq/ops/packed.py calls them where they serve.
#include <map>
#include <memory>
#include <mutex>

#include "../code_forms.h"
#include "../residual_search.h"
#include "../topk_search.h"
#include "search_arguments.h"

using namespace fastvq::bindings;

namespace {

using fastvq::CodeForms;

// Codes that a caller keeps packed, and a copy of them: whatever happens to the tensor that they came from, a search
// reads nothing else.
class PackedCodes {
 public:
  explicit PackedCodes(const Matrix& given)
      : copy_(new char[given.rows * given.dim * fastvq::size_of(given.dtype)]),
        codes_{given.dtype, copy_.get(), given.rows, given.dim},
        l2_(fastvq::active_isa(), codes_, fastvq::Metric::l2, fastvq::Lifetime::kept),
        dot_(fastvq::active_isa(), codes_, fastvq::Metric::dot, fastvq::Lifetime::kept) {
    std::copy_n(static_cast<const char*>(given.data), given.rows * given.dim * fastvq::size_of(given.dtype),
                copy_.get());
  }

  CodeForms& forms(fastvq::Metric metric) { return metric == fastvq::Metric::l2 ? l2_ : dot_; }

 private:
  const std::unique_ptr<char[]> copy_;
  const Matrix codes_;
  CodeForms l2_, dot_;
};

// Of heads or stages. A caller has a number for it, never a pointer.
using PackedParts = std::vector<std::unique_ptr<PackedCodes>>;

class PackedRegistry {
 public:
  int64_t add(std::shared_ptr<const PackedParts> parts) {
    const std::lock_guard<std::mutex> lock(changing_);
    parts_.emplace(++last_, std::move(parts));
    return last_;
  }

  void remove(int64_t number) {
    std::shared_ptr<const PackedParts> freed;  // after the lock
    const std::lock_guard<std::mutex> lock(changing_);
    const auto found = parts_.find(number);
    if (found == parts_.end()) return;
    freed = std::move(found->second);
    parts_.erase(found);
  }

  std::shared_ptr<const PackedParts> get(int64_t number) const {
    const std::lock_guard<std::mutex> lock(changing_);
    const auto found = parts_.find(number);
    require(found != parts_.end(), "packed", "no packed codebook has the number ", number);
    return found->second;
  }

 private:
  mutable std::mutex changing_;
  std::map<int64_t, std::shared_ptr<const PackedParts>> parts_;
  int64_t last_ = 0;
};

PackedRegistry& packed_registry() {
  static auto* const registry = new PackedRegistry;  // threads may search while the process ends
  return *registry;
}

int64_t pack(const std::vector<Tensor>& codebooks, int64_t metric) {
  require(!codebooks.empty(), "codebooks", "must hold at least one");
  const Stack stack(codebooks, codebooks[0]);
  const fastvq::Metric kind = metric_of(metric);
  auto parts = std::make_shared<PackedParts>();
  const IeeeArithmetic arithmetic;
  for (const Matrix& codes : stack.matrices) {
    parts->push_back(std::make_unique<PackedCodes>(codes));
    fastvq::prepare(fastvq::active_isa(), fastvq::active_precision(), parts->back()->forms(kind), PARALLEL);
  }
  return packed_registry().add(std::move(parts));
}

// x [rows, dim], or [heads, rows, dim] beside a codebook for each head, and `width` indices for each row. Calls
// run(rows, forms of the codes, their indices).
template <class Run>
Tensor search_packed(const Tensor& x, int64_t packed, int64_t metric, const std::optional<Tensor>& mask, bool many,
                     int64_t width, const Run& run) {
  const auto parts = packed_registry().get(packed);
  const fastvq::Metric kind = metric_of(metric);
  const bool headed = x.dim() == 3;
  const Tensor vectors = values("x", x, headed ? 3 : 2);
  const int64_t heads = headed ? x.size(0) : 1, rows = x.size(-2);
  require(static_cast<int64_t>(parts->size()) == heads, "codebook", "must have the heads of x, ", heads);
  Shape shape = headed ? Shape{heads, rows} : Shape{rows};
  const auto included = exactly("mask", mask, ScalarType::Bool, shape);
  if (many) shape.push_back(width);
  Tensor result = empty(shape, ScalarType::Long);
  const bool* given = booleans(included);
  auto* out = mutable_integers(result);
  const IeeeArithmetic arithmetic;
  for (int64_t h = 0; h < heads; ++h) {
    CodeForms& forms = (*parts)[h]->forms(kind);
    require(forms.codes.dim == x.size(-1), "codebook", "must have the dimension of x, ", x.size(-1));
    require(width <= forms.codes.rows, "k", "must lie in [1, ", forms.codes.rows, "], got ", width);
    run_masked(matrix_of(vectors, h), given ? given + h * rows : nullptr, width, out + h * rows * width,
               [&](const Matrix& own_rows, int64_t* indices) { run(own_rows, forms, indices); });
  }
  return result;
}

Tensor packed_search(const Tensor& x, int64_t packed, int64_t metric, const std::optional<Tensor>& mask) {
  return search_packed(x, packed, metric, mask, false, 1, [](const Matrix& rows, CodeForms& forms, int64_t* indices) {
    fastvq::search(fastvq::active_isa(), fastvq::active_precision(), rows, forms, indices, PARALLEL);
  });
}

Tensor packed_topk_search(const Tensor& x, int64_t packed, int64_t k, int64_t metric,
                          const std::optional<Tensor>& mask) {
  require(k >= 1, "k", "must be positive, got ", k);
  return search_packed(x, packed, metric, mask, true, k, [&](const Matrix& rows, CodeForms& forms, int64_t* indices) {
    fastvq::topk_search(fastvq::active_isa(), fastvq::active_precision(), rows, forms, k, indices, PARALLEL);
  });
}

Tensor packed_residual_search(const Tensor& x, int64_t packed, int64_t metric, const std::optional<Tensor>& mask) {
  const auto parts = packed_registry().get(packed);
  const fastvq::Metric kind = metric_of(metric);
  std::vector<CodeForms*> stages;
  for (const auto& part : *parts) {
    stages.push_back(&part->forms(kind));
    require(stages.back()->codes.dim == x.size(-1), "codebooks", "must have the dimension of x, ", x.size(-1));
  }
  return search_stages(x, static_cast<int64_t>(stages.size()), mask, [&](const Matrix& rows, int64_t* indices) {
    fastvq::residual_search(fastvq::active_isa(), fastvq::active_precision(), rows, stages, indices, PARALLEL);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvq, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("packed_search", TORCH_BOX(&packed_search));
  m.impl("packed_topk_search", TORCH_BOX(&packed_topk_search));
  m.impl("packed_residual_search", TORCH_BOX(&packed_residual_search));
}

// Called by fastvq/backends/native.py: frees a packed codebook once no search uses it. Its number may be unknown.
extern "C" __attribute__((visibility("default"))) void fastvq_native_free_packed(int64_t number) {
  packed_registry().remove(number);
}
