// Queries, keys and values in the type and layout in which products read them.
#pragma once

#include "common/parallel.h"
#include "cpu/swa_rows.h"

namespace ttt::TTT_ISA::swa {

// Elements from one row of D to the next: whole register tiles, and no power of two, which would map every
// row to the same few cache sets.
template <class C>
inline int64_t row_stride(int64_t D) {
    return round_up(D, kColumns<C>) + kColumns<C>;
}

// out (D rounded up to kColumns) = row * factor, then zeros.
template <class T, class C = compute_t<T>>
inline void widen_row(const T* row, int64_t D, C factor, C* out) {
    constexpr int L = lanes<C>;
    int64_t d = 0;
    for (; d + L <= D; d += L) store(out + d, load(row + d) * factor);
    if (d < D) {
        store(out + d, load_first(row + d, D - d) * factor);
        d += L;
    }
    for (; d < round_up(D, kColumns<C>); d += L) store(out + d, vec<C>{});
}

// out (D) = row * factor, in a tensor's element type.
template <class T, class C = compute_t<T>>
inline void narrow_row(const C* row, int64_t D, C factor, T* out) {
    constexpr int L = lanes<C>;
    int64_t d = 0;
    for (; d + L <= D; d += L) store(out + d, load(row + d) * factor);
    if (d < D) store_first(out + d, load(row + d) * factor, D - d);
}

// rows (n, D) -> (n / kColumns, D, kColumns), the transpose in panels; n is a multiple of kColumns.
template <class C>
inline void transpose_panels(const C* rows, int64_t stride, int64_t n, int64_t D, C* panels) {
    for (int64_t j = 0; j < n; j += kColumns<C>)
        for (int64_t d = 0; d < D; ++d, panels += kColumns<C>)
            for (int64_t i = 0; i < kColumns<C>; ++i) panels[i] = rows[(j + i) * stride + d];
}

// A block of kKeys rows of which the `present` exist, and zeros.
template <class T, class C = compute_t<T>>
inline void widen_block(const T* rows, int64_t t, Range present, int64_t D, C* out) {
    const int64_t stride = row_stride<C>(D);
    fill(out, present.begin * stride, C(0));
    for (int64_t j = present.begin; j < present.end; ++j) widen_row(rows + j * t, D, C(1), out + j * stride);
    fill(out + present.end * stride, (kKeys - present.end) * stride, C(0));
}

// Rows of queries for a task: (padded, row_stride) times `factor`, zeros after the last; and their panels.
template <class T, class C = compute_t<T>>
inline void pack_queries(const Tensor<T>& from, const Queries& queries, int64_t D, C factor, C* rows,
                         C* panels) {
    const int64_t n = queries.rows(), padded = round_up(n, kQueries), stride = row_stride<C>(D);
    for (int64_t r = 0; r < n; ++r)
        widen_row(from.at(queries.b, queries.position(r), queries.head(r)), D, factor, rows + r * stride);
    fill(rows + n * stride, (padded - n) * stride, C(0));
    transpose_panels(rows, stride, padded, D, panels);
}

// Keys and values of some groups, rows of row_stride, a group's keys together. Read where they are, the rows
// of one head lie a whole token apart, so that every row costs a miss of the address cache, in every task.
template <class C>
struct Keys {
    C* memory;
    int64_t size, stride;

    C* k(int64_t group, int64_t key) const { return memory + 2 * group * size + key * stride; }
    C* v(int64_t group, int64_t key) const { return memory + (2 * group + 1) * size + key * stride; }
};

// Packed keys and values take about this much memory at a time: an allocation that the allocator keeps.
constexpr int64_t kPackedBytes = 24 << 20;

// Calls f(groups, keys) for ranges of groups, one after the other, whose keys and values are packed. Rows
// that no query sees are zeros, because a weight of 0 must not meet whatever is there.
template <class T, class F, class C = compute_t<T>>
inline void with_packed(const Sizes& s, const Tensor<T>& k, const Tensor<T>& v, F&& f) {
    const int64_t blocks = (s.Tk + kKeys - 1) / kKeys, stride = row_stride<C>(s.D),
                  size = blocks * kKeys * stride;
    const int64_t bytes = 2 * size * static_cast<int64_t>(sizeof(C));
    const int64_t together = least(s.groups(), most(1, kPackedBytes / bytes));
    Scratch<C> scratch(together * 2 * size);
    const Keys<C> keys{scratch.take(0), size, stride};
    for (int64_t begin = 0; begin < s.groups(); begin += together) {
        const Range groups{begin, least(begin + together, s.groups())};
        parallel_tasks(blocks * groups.size(), [&](int64_t task, int) {
            const int64_t group = task % groups.size(), origin = task / groups.size() * kKeys;
            const Queries queries = s.queries(begin + group, 0);
            const Range present = (Range{queries.first_key(0), s.Tk} - origin) & Range{0, kKeys};
            if (present.empty()) return;
            widen_block(k.at(queries.b, origin, queries.kv_head), k.t, present, s.D, keys.k(group, origin));
            widen_block(v.at(queries.b, origin, queries.kv_head), v.t, present, s.D, keys.v(group, origin));
        });
        f(groups, keys);
    }
}

}  // namespace ttt::TTT_ISA::swa
