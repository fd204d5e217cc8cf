// Queries, keys and values in the type and layout in which products read them.
#pragma once

#include "common/parallel.h"
#include "cpu/swa_rows.h"

namespace ttt::TTT_ISA::swa {

// rows (n, D) -> (n / kColumns, D, kColumns), the transpose in panels; n is a multiple of kColumns.
template <class C>
inline void transpose_panels(const C* rows, int64_t stride, int64_t n, int64_t D, C* panels) {
    for (int64_t j = 0; j < n; j += kColumns<C>)
        for (int64_t d = 0; d < D; ++d, panels += kColumns<C>)
            for (int64_t i = 0; i < kColumns<C>; ++i) panels[i] = rows[(j + i) * stride + d];
}

// Rows of queries for a task: (padded, row_stride) times `factor`, zeros after the last; and their panels.
template <class C>
inline void pack_queries(const Source<C>& from, const Queries& queries, int64_t D, C factor, C* rows,
                         C* panels) {
    const int64_t n = queries.rows(), padded = round_up(n, kQueries), stride = row_stride<C>(D);
    for (int64_t r = 0; r < n; ++r)
        from.read(queries.b, queries.position(r), queries.head(r), D, factor, rows + r * stride);
    fill(rows + n * stride, (padded - n) * stride, C(0));
    transpose_panels(rows, stride, padded, D, panels);
}

// A tensor of keys, or of what has a row for each of the keys from `start` on.
template <class C>
struct KeySource {
    Source<C> rows;
    int64_t start = 0;
};

// Some tensors of keys, for some groups: rows of row_stride, those of a tensor and a group together. Read
// where they are, the rows of one head lie a whole token apart, so that every row costs a miss of the address
// cache, in every task.
template <class C>
struct Keys {
    C* memory;
    int64_t tensors, size, stride;

    C* at(int64_t tensor, int64_t group, int64_t key) const {
        return memory + (group * tensors + tensor) * size + key * stride;
    }
};

// Packed keys take about this much memory at a time: an allocation that the allocator keeps.
constexpr int64_t kPackedBytes = 24 << 20;

// Calls f(groups, keys) for ranges of groups, one after the other, whose rows of `sources` are packed. Rows
// that no query sees are zeros, because a weight of 0 must not meet whatever is there.
template <class C, int n, class F>
inline void with_packed(const Sizes& s, const KeySource<C> (&sources)[n], F&& f) {
    const int64_t blocks = (s.Tk + kKeys - 1) / kKeys, stride = row_stride<C>(s.D),
                  size = blocks * kKeys * stride;
    const int64_t bytes = n * size * static_cast<int64_t>(sizeof(C));
    const int64_t together = least(s.groups(), most(1, kPackedBytes / bytes));
    Scratch<C> scratch(together * n * size);
    const Keys<C> keys{scratch.take(0), n, size, stride};
    for (int64_t begin = 0; begin < s.groups(); begin += together) {
        const Range groups{begin, least(begin + together, s.groups())};
        parallel_tasks(blocks * groups.size(), [&](int64_t task, int) {
            const int64_t group = task % groups.size(), origin = task / groups.size() * kKeys;
            const Queries queries = s.queries(begin + group, 0);
            const Range block{origin, origin + kKeys}, seen = block & Range{queries.first_key(0), s.Tk};
            if (seen.empty()) return;
            for (int i = 0; i < n; ++i) {
                const KeySource<C>& source = sources[i];
                if (!source.rows) continue;
                const Range present = seen & Range{source.start, s.Tk};
                C* out = keys.at(i, group, origin);
                for (int64_t j = block.begin; j < block.end; ++j, out += stride) {
                    if (j < present.begin || j >= present.end)
                        fill(out, stride, C(0));
                    else
                        source.rows.read(queries.b, j - source.start, queries.kv_head, s.D, C(1), out);
                }
            }
        });
        f(groups, keys);
    }
}

}  // namespace ttt::TTT_ISA::swa
