// How Python calls kernels: addresses come as integers and element types as codes, sizes and factors as they
// are.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/scalar.h"

namespace ttt {

template <class To, class From>
To convert(From value) {
    if constexpr (std::is_pointer_v<To>)
        return reinterpret_cast<To>(value);
    else
        return static_cast<To>(value);
}
template <class To>
using from_python = std::conditional_t<std::is_pointer_v<To>, uintptr_t,
                                       std::conditional_t<std::is_same_v<To, Dtype>, int, To>>;

// Defines `name`, which calls f(Args...) while other threads may run Python.
template <class Result, class... Args, class F>
void define(pybind11::module_& m, const char* name, F&& f) {
    m.def(name, [f = std::forward<F>(f)](from_python<Args>... args) {
        pybind11::gil_scoped_release release;
        return static_cast<Result>(f(convert<Args>(args)...));
    });
}

}  // namespace ttt
