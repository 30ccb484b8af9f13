// The Python module: the build's facts. The tensor ops register themselves with the dispatcher when it is loaded.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "paamops' C++ kernels, registered with the PyTorch dispatcher on import";
  module.def("build_facts", [] {
    py::dict facts;
    facts["built_with_torch"] = PAAMOPS_BUILT_WITH;
    facts["stable_abi_floor"] = "2.10";
    facts["compiler"] = std::string(__VERSION__);
    return facts;
  });
}
