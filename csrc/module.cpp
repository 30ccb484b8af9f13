// The Python module: the build's facts. The tensor ops register themselves with the dispatcher when it is loaded.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "simd.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "paamops' C++ kernels, registered with the PyTorch dispatcher on import";
  module.def("build_facts", [] {
    py::dict facts;
    facts["built_with_torch"] = PAAMOPS_BUILT_WITH;
    facts["stable_abi_floor"] = "2.10";
    facts["compiler"] = std::string(__VERSION__);
    facts["instruction_set"] = paamops::instruction_set();
    return facts;
  });
  module.def(
      "use_instruction_set",
      [](int set) {
        if (set < 2 || set > paamops::detected_instruction_set()) {
          throw std::invalid_argument("set must be 2 (any), 3 (AVX2) or 4 (AVX-512), and what this machine has");
        }
        paamops::instruction_set() = set;
      },
      "For tests: the vector instructions to use, 2, 3 or 4, at most what the machine has.");
}
