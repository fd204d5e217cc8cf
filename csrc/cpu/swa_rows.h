// Which query rows a task of the attention kernels has, and which keys they see.
#pragma once

#include <new>

#include "cpu/swa_tiles.h"

namespace ttt::TTT_ISA::swa {

// Memory for a while, handed out in parts. Parts are whole cache lines, because their numbers of rows are
// multiples of kKeys or kQueries.
template <class C>
class Scratch {
  public:
    explicit Scratch(int64_t elements)
        : data_(static_cast<C*>(::operator new(sizeof(C) * elements, std::align_val_t{64}))), free_(data_) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    C* take(int64_t elements) {
        C* p = free_;
        free_ += elements;
        return p;
    }

  private:
    C* data_;
    C* free_;
};

template <class C>
inline void fill(C* p, int64_t n, C value) {
    for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// A range of keys or rows; empty where begin >= end.
struct Range {
    int64_t begin, end;

    bool empty() const { return begin >= end; }
    int64_t size() const { return end - begin; }
    Range operator&(Range other) const { return {most(begin, other.begin), least(end, other.end)}; }
    Range operator-(int64_t origin) const { return {begin - origin, end - origin}; }
};

// A (B, T, heads, D) tensor.
template <class T>
struct Tensor {
    const T* data;
    int64_t b, t, h;

    const T* at(int64_t sequence, int64_t position, int64_t head) const {
        return data + sequence * b + position * t + head * h;
    }
};

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

// out (D) = what narrow_row loses of a row, in its element type.
template <class T, class C = compute_t<T>>
inline void narrow_rest(const C* row, int64_t D, C factor, T* out) {
    constexpr int L = lanes<C>;
    T kept[L];
    for (int64_t d = 0; d < D; d += L) {
        const vec<C> x = load(row + d) * factor;
        store(kept, x);
        store_first(out + d, x - load(kept), least(L, D - d));
    }
}

// A tensor whose rows are read in the type computed in, so that what is computed from them is compiled once
// for all element types. Without data: not given.
template <class C>
class Source {
  public:
    Source() = default;
    template <class T>
    Source(Tensor<T> from)
        : data_(reinterpret_cast<const char*>(from.data)),
          b_(from.b * size(from)),
          t_(from.t * size(from)),
          h_(from.h * size(from)),
          widen_([](const void* row, int64_t D, C factor, C* out) {
              widen_row(static_cast<const T*>(row), D, factor, out);
          }) {}

    explicit operator bool() const { return data_ != nullptr; }
    // out (D rounded up to kColumns) = row * factor, then zeros.
    void read(int64_t sequence, int64_t position, int64_t head, int64_t D, C factor, C* out) const {
        widen_(data_ + sequence * b_ + position * t_ + head * h_, D, factor, out);
    }

  private:
    template <class T>
    static int64_t size(const Tensor<T>&) {
        return sizeof(T);
    }

    const char* data_ = nullptr;
    int64_t b_ = 0, t_ = 0, h_ = 0;
    void (*widen_)(const void*, int64_t, C, C*) = nullptr;
};

// The rows of a contiguous (B, T, heads, D) result, in its element type. Without data: not wanted.
template <class C>
class Sink {
  public:
    template <class T>
    Sink(T* data, int64_t T_, int64_t heads, int64_t D)
        : data_(reinterpret_cast<char*>(data)),
          positions_(T_),
          heads_(heads),
          D_(D),
          size_(sizeof(T)),
          narrow_([](const C* row, int64_t n, C factor, void* out) {
              narrow_row(row, n, factor, static_cast<T*>(out));
          }),
          narrow_rest_([](const C* row, int64_t n, C factor, void* out) {
              narrow_rest(row, n, factor, static_cast<T*>(out));
          }) {}

    explicit operator bool() const { return data_ != nullptr; }
    // That row = row * factor.
    void write(int64_t sequence, int64_t position, int64_t head, const C* row, C factor) const {
        narrow_(row, D_, factor, at(sequence, position, head));
    }
    // That row = what `write` loses to rounding.
    void write_rest(int64_t sequence, int64_t position, int64_t head, const C* row, C factor) const {
        narrow_rest_(row, D_, factor, at(sequence, position, head));
    }

  private:
    char* at(int64_t sequence, int64_t position, int64_t head) const {
        return data_ + ((sequence * positions_ + position) * heads_ + head) * D_ * size_;
    }

    char* data_;
    int64_t positions_, heads_, D_, size_;
    void (*narrow_)(const C*, int64_t, C, void*);
    void (*narrow_rest_)(const C*, int64_t, C, void*);
};

// The query rows of a task: all heads of a group at positions [begin, end), row r being at position
// begin + r / group.
struct Queries {
    int64_t b, kv_head, begin, end, group, shift;
    const int64_t* first;

    int64_t rows() const { return (end - begin) * group; }
    int64_t position(int64_t row) const { return begin + row / group; }
    int64_t head(int64_t row) const { return kv_head * group + row % group; }
    int64_t first_key(int64_t row) const { return first[position(row)]; }
    int64_t end_key(int64_t row) const { return shift + position(row) + 1; }
    // Keys that some of the rows see.
    Range keys(Range of_rows) const { return {first_key(of_rows.begin), end_key(of_rows.end - 1)}; }
    Range keys() const { return keys({0, rows()}); }
    // Whether every one of these rows sees every one of these keys.
    bool all_see(Range of_rows, Range of_keys) const {
        return first_key(of_rows.end - 1) <= of_keys.begin && end_key(of_rows.begin) >= of_keys.end;
    }
};

// Query rows of a task, about: few enough for their part of the second-level cache.
constexpr int64_t kTaskRows = 288;

// What a call works on. A "group" is one head of keys with the heads of queries that share it, in one
// sequence.
struct Sizes {
    int64_t B, Tq, Tk, H, Hk, D;
    const int64_t* first;
    int64_t first_b;

    int64_t group() const { return H / Hk; }
    int64_t groups() const { return B * Hk; }
    // Parts that the queries of a group of heads are shared out in, of about kTaskRows rows.
    int64_t chunks() const { return least(Tq, (Tq * group() + kTaskRows - 1) / kTaskRows); }
    int64_t most_rows() const { return (Tq + chunks() - 1) / chunks() * group(); }
    Queries queries(int64_t of_group, int64_t chunk) const {
        const int64_t b = of_group / Hk, n = chunks();
        return {b,       of_group % Hk, chunk * Tq / n,     (chunk + 1) * Tq / n,
                group(), Tk - Tq,       first + b * first_b};
    }
};

// Puts -inf where a row of a tile of scores does not see a key: tile (keys, kQueries) of the query rows
// `of_rows` and `of_keys`, of which only the `present` may be seen. Columns are filled up to kQueries.
template <class C>
inline void hide(const Queries& queries, Range of_rows, Range of_keys, Range present, C* tile) {
    if (queries.all_see(of_rows, of_keys) && (of_keys & present).size() == of_keys.size()) return;
    int64_t end = 0;
    for (int64_t key = of_keys.begin; key < of_keys.end; ++key, tile += kQueries) {
        while (end < of_rows.size() && queries.first_key(of_rows.begin + end) <= key) ++end;
        const bool absent = key < present.begin || key >= present.end;
        const int64_t first_row = (key - queries.shift - queries.begin) * queries.group - of_rows.begin;
        const int64_t begin = absent ? end : least(end, most(0, first_row));
        fill(tile, begin, C(-INFINITY));
        fill(tile + end, kQueries - end, C(-INFINITY));
    }
}

}  // namespace ttt::TTT_ISA::swa
