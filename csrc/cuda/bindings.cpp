// What Python sees of the CUDA backend. Nothing here knows of torch, and nothing needs a GPU until a kernel
// runs.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "common/bind.h"
#include "cuda/kernels.h"

namespace {

template <class Result, class... Args>
void bind(pybind11::module_& m, const char* name, Result (*kernel)(Args...)) {
    ttt::define<Result, Args...>(m, name, kernel);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of ttt_kernels: addresses, sizes and strides in, nothing out";
    m.def("architectures", [] {
        pybind11::list names;
        std::istringstream all(TTT_CUDA_ARCHITECTURES);
        for (std::string name; all >> name;) names.append(name);
        return names;
    });
#define TTT_BIND(name) bind(m, #name, &ttt::cuda::name);
    TTT_CUDA_KERNELS(TTT_BIND)
#undef TTT_BIND
}
