// Loops over contiguous elements by whole vectors and a last one that is not full.
#pragma once

#include "common/vec.h"

namespace ttt::TTT_ISA {

// Calls f(i, n) for the n elements from i on: a whole vector of them, or what is left.
template <class C, class F>
inline void for_each_vector(int64_t begin, int64_t end, F&& f) {
    constexpr int L = lanes<C>;
    int64_t i = begin;
    for (; i + L <= end; i += L) f(i, int64_t{L});
    if (i < end) f(i, end - i);
}

// n elements as a vector, with zeros behind them.
template <class T>
inline vec<compute_t<T>> read(const T* p, int64_t n) {
    return n == lanes<compute_t<T>> ? load(p) : load_first(p, n);
}
// As `read`, or zeros without an address.
template <class T>
inline vec<compute_t<T>> read_or_zero(const T* p, int64_t i, int64_t n) {
    return p ? read(p + i, n) : vec<compute_t<T>>{};
}

template <class T>
inline void write(T* p, vec<compute_t<T>> v, int64_t n) {
    if (n == lanes<compute_t<T>>)
        store(p, v);
    else
        store_first(p, v, n);
}

// Whether vectors from p on can be written past the caches: only whole ones that do not lie across two lines.
template <class T>
inline bool streamable(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % (lanes<compute_t<T>> * sizeof(T)) == 0;
}
// As `write`, past the caches where `stream` says so: a result that no cache can keep would otherwise be read
// from memory before it is written. end_stream() must follow before others may read it.
template <class T>
inline void write(T* p, vec<compute_t<T>> v, int64_t n, bool stream) {
    if (stream && n == lanes<compute_t<T>>)
        store_past_caches(p, v);
    else
        write(p, v, n);
}

}  // namespace ttt::TTT_ISA
