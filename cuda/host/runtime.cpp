// The runtime that libraries of kernels are loaded beside.
#include "grid.h"

namespace fwd::host {
__thread Self* current __attribute__((tls_model("initial-exec"))) = nullptr;
}
