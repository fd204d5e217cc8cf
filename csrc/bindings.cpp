// What Python sees: every kernel with addresses as integers. Nothing here knows of torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/bind.h"
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

using ttt::Kernels;

bool runs_here(const std::string& isa) {
    if (isa == "portable") return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == "avx2") return avx2;
    if (isa == "avx512") return avx512;
    if (isa == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return false;
}

struct Set {
    std::string name;
    Kernels (*kernels)();
};

// Every set that was built and runs on this processor, plainest first.
std::vector<Set> sets() {
    std::vector<Set> all;
    all.push_back({"portable", &ttt::portable::kernels});
#ifdef TTT_BUILT_AVX2
    all.push_back({"avx2", &ttt::avx2::kernels});
#endif
#ifdef TTT_BUILT_AVX512
    all.push_back({"avx512", &ttt::avx512::kernels});
#endif
#ifdef TTT_BUILT_AVX512_BF16
    all.push_back({"avx512_bf16", &ttt::avx512_bf16::kernels});
#endif
    std::vector<Set> usable;
    for (const Set& set : all)
        if (runs_here(set.name)) usable.push_back(set);
    return usable;
}

std::string chosen = sets().back().name;
Kernels table = sets().back().kernels();

void choose(const std::string& name) {
    for (const Set& set : sets()) {
        if (set.name == name) {
            table = set.kernels();
            chosen = name;
            return;
        }
    }
    throw std::invalid_argument("instruction set '" + name + "' does not run here");
}

template <class... Args>
void bind(py::module_& m, const char* name, void (*Kernels::*member)(Args...)) {
    ttt::define<void, Args...>(m, name, [member](Args... args) { (table.*member)(args...); });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels of ttt_kernels: addresses, sizes and strides in, nothing out";
    m.def("instruction_set", [] { return chosen; });
    m.def("instruction_sets", [] {
        py::list names;
        for (const Set& set : sets()) names.append(set.name);
        return names;
    });
    m.def("choose_instruction_set", &choose);
    m.def("max_threads", &ttt::max_threads);
#define TTT_BIND(name) bind(m, #name, &Kernels::name);
    TTT_KERNELS(TTT_BIND)
#undef TTT_BIND
}
