// Whether the native kernels serve the ops that users call, and what fastvq/backends/native.py asks of the library.
//
// Each kernel is registered under its own op, native_<name>, and under the op <name> that users call. There it serves
// while `direct` is set, which fastvq/backends/select.py does while no other backend is requested, and otherwise hands
// the call to select_<name>, the choice of a backend in Python. The kernels stay registered: to remove one while
// another thread looks it up is a race in torch's dispatcher.
#include <atomic>
#include <string>

#include "../peak.h"
#include "common.h"

// Which only newer versions of torch have: the message of the last error behind a call of its C functions.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastvq::bindings {

namespace {

std::atomic<bool> direct{false};

// The message of an exception of Python without its type, which the caller's exception has again, and its stack.
std::string plain_message(const std::string& what) {
  const size_t type = what.find(": ");
  const bool typed = type != std::string::npos && type >= 5 && what.compare(type - 5, 5, "Error") == 0 &&
                     what.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.") == type;
  const size_t begin = typed ? type + 2 : 0, end = what.find("\n\nAt:\n");
  return what.substr(begin, end == std::string::npos ? end : end - begin);
}

}  // namespace

bool serves_directly() {
  return direct.load(std::memory_order_relaxed);
}

void serve(bool here, Boxed kernel, const char* other, StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  if (here) return kernel(stack, inputs, outputs);
  if (!torch_call_dispatcher(other, "", stack, TORCH_ABI_VERSION)) return;
  const char* what =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(what && *what ? plain_message(what) : std::string(other) + " has failed behind the library");
}

}  // namespace fastvq::bindings

// Whether the kernels serve the ops that users call.
extern "C" __attribute__((visibility("default"))) void fastvq_native_serve(int yes) {
  fastvq::bindings::direct.store(yes != 0, std::memory_order_relaxed);
}

// The instruction set in use, or why FASTVQ_ISA or FASTVQ_TIER can't be met.
extern "C" __attribute__((visibility("default"))) const char* fastvq_native_isa(const char** error) {
  static std::string message;
  try {
    fastvq::active_precision();
    return fastvq::active_isa().name;
  } catch (const std::exception& e) {
    message = e.what();
    *error = message.c_str();
    return nullptr;
  }
}

// For the benchmarks: see peak.h.
extern "C" __attribute__((visibility("default"))) double fastvq_native_peak(const char* kind, int threads) {
  return fastvq::peak(kind, threads);
}
