// One token through the whole stack in one parallel region: nearly all the time goes into reading weights, in
// stages so short that to leave a region and enter another between them is felt (1.8 against 0.3 us). What is
// small (norms, rotations, residual sums) every worker computes for itself, rather than wait once more.
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>

#include "common/parallel.h"
#include "common/vec.h"
#include "cpu/decode_attention.h"
#include "cpu/decode_product.h"
#include "cpu/decode_rows.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

constexpr int64_t kLine = 64;

struct Layer {
#define TTT_FIELD(name) int64_t name;
    TTT_DECODE_LAYER(TTT_FIELD)
#undef TTT_FIELD
};

template <class T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Memory for `copies` arrays of n elements, each beginning on a cache line.
template <class E>
class Buffer {
  public:
    Buffer(int64_t copies, int64_t n)
        : stride_(divide_up(n * static_cast<int64_t>(sizeof(E)), kLine) * kLine /
                  static_cast<int64_t>(sizeof(E))),
          memory_(static_cast<E*>(
              ::operator new(static_cast<size_t>(copies * stride_) * sizeof(E), kAlignment))) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(memory_, kAlignment); }
    E* copy(int64_t i) const { return memory_ + i * stride_; }

  private:
    static constexpr std::align_val_t kAlignment{kLine};
    const int64_t stride_;
    E* const memory_;
};

// What one step reads and writes, and what its workers share.
template <class T>
struct Step {
    const int64_t* layers;
    const int64_t* visible;
    int64_t n_layers, n_prefix;
    const T* x;
    const float* cos;
    const float* sin;
    const float* final_norm;
    const T* head;
    T* prefix_output;
    T* hidden;
    float* logits;
    int64_t batch, d, heads, intermediate, vocab;
    float eps;

    int64_t head_dim = d / heads;
    int64_t workers = max_threads();
    int64_t most_pieces = pieces_of_longest();
    Buffer<T> qkv{1, batch * 3 * d};
    Buffer<T> out{1, batch * d};
    Buffer<T> gated{1, batch * intermediate};
    Buffer<float> largest{1, batch * heads * kMostPieces};
    Buffer<float> totals{1, batch * heads * kMostPieces};
    Buffer<float> weighted{1, batch * most_pieces * d};
    // Of each worker: the residual stream, the operand of the product at hand, and so on.
    Buffer<T> stream{workers, batch * d};
    Buffer<float> operand{workers, batch * (d > intermediate ? d : intermediate)};
    Buffer<float> queries{workers, batch * d};
    Buffer<float> sums{workers, 2 * batch * kStreams * kRun};
    Buffer<float> scores{workers, heads * kTile};
    Buffer<float> turned{workers, head_dim};

    int64_t pieces_of_longest() const {
        int64_t most = 1;
        for (int64_t i = 0; i < n_layers; ++i) {
            const int64_t pieces = divide_up(visible[2 * i + 1], keys_per_piece(visible[2 * i + 1]));
            if (pieces > most) most = pieces;
        }
        return most;
    }
};

template <class T>
class Worker {
  public:
    Worker(const Step<T>& step, Team& team, int id)
        : s(step),
          team_(team),
          id_(id),
          x_(step.stream.copy(id)),
          in_(step.operand.copy(id)),
          queries_(step.queries.copy(id)),
          gate_sums_(step.sums.copy(id)),
          up_sums_(gate_sums_ + step.batch * kStreams * kRun),
          scores_(step.scores.copy(id)),
          turned_(step.turned.copy(id)) {}

    void run() {
        copy_row(s.x, x_, s.batch * s.d);
        keep_prefix_output(0);
        for (int64_t i = 0; i < s.n_layers; ++i) {
            Layer layer;
            std::memcpy(&layer, s.layers + i * (sizeof(Layer) / sizeof(int64_t)), sizeof layer);
            attention(layer, s.visible[2 * i], s.visible[2 * i + 1]);
            if (layer.fast_gate)
                mlp(layer.fast_norm, layer.fast_gate, layer.fast_up, layer.fast_down, layer.fast_post_norm,
                    true);
            mlp(layer.mlp_norm, layer.w_gate, layer.w_up, layer.w_down, layer.mlp_post_norm, false);
            keep_prefix_output(i + 1);
        }
        norm(s.final_norm);
        if (id_ == 0) copy_row(in_, s.hidden, s.batch * s.d);
        multiply(s.head, s.vocab, s.d, s.logits, false);
    }

  private:
    void keep_prefix_output(int64_t layers_done) {
        if (id_ == 0 && layers_done == s.n_prefix) copy_row(x_, s.prefix_output, s.batch * s.d);
    }

    void norm(const float* weight) {
        for (int64_t b = 0; b < s.batch; ++b) normalize(x_ + b * s.d, weight, in_ + b * s.d, s.d, s.eps);
    }

    void add(const float* weight) {
        const T* out = s.out.copy(0);
        for (int64_t b = 0; b < s.batch; ++b) add_normalized(x_ + b * s.d, out + b * s.d, weight, s.d, s.eps);
    }

    // Calls f(sequence, sequences, rows) for tasks that together are all rows of a matrix, for all sequences
    // at once or of one matrix for each.
    template <class F>
    void share_rows(int64_t rows, bool per_sequence, F&& f) {
        const int64_t matrices = per_sequence ? s.batch : 1;
        const auto share = [&](int64_t owner) { return Share(rows, owner, team_.workers()); };
        share_stage(
            team_, id_, [&](int64_t owner) { return matrices * share(owner).tasks(); },
            [&](int64_t owner, int64_t task) {
                const Share own = share(owner);
                f(task / own.tasks(), s.batch / matrices, own.task(task % own.tasks()));
            });
    }

    // Calls f(offset in sums, sequence, first row) for each run of rows that `product` has made for each
    // sequence.
    template <class F>
    static void each_run(int64_t sequence, int64_t sequences, const Rows& part, F&& f) {
        for (int64_t b = 0; b < sequences; ++b)
            for (int64_t i = 0; i < part.streams; ++i)
                f((b * kStreams + i) * kRun, sequence + b, part.first + i * part.apart);
    }

    // out (batch, rows) = in_ (batch, n) w^T, w (rows, n) or (batch, rows, n)
    template <class Out>
    void multiply(const T* w, int64_t rows, int64_t n, Out* out, bool per_sequence) {
        share_rows(rows, per_sequence, [&](int64_t sequence, int64_t sequences, const Rows& part) {
            product(w + sequence * rows * n, part, n, in_ + sequence * n, sequences, gate_sums_);
            each_run(sequence, sequences, part, [&](int64_t i, int64_t b, int64_t row) {
                copy_row(gate_sums_ + i, out + b * rows + row, part.count);
            });
        });
    }

    // x_ += rms_norm(swiglu(rms_norm(x_)))
    void mlp(int64_t norm_weight, int64_t gate, int64_t up, int64_t down, int64_t post_norm,
             bool per_sequence) {
        norm(at<const float>(norm_weight));
        const int64_t rows = s.intermediate, n = s.d;
        T* hidden = s.gated.copy(0);
        share_rows(rows, per_sequence, [&](int64_t sequence, int64_t sequences, const Rows& part) {
            const int64_t matrix = sequence * rows * n;
            const float* x = in_ + sequence * n;
            product(at<const T>(gate) + matrix, part, n, x, sequences, gate_sums_);
            product(at<const T>(up) + matrix, part, n, x, sequences, up_sums_);
            each_run(sequence, sequences, part, [&](int64_t i, int64_t b, int64_t row) {
                gated(gate_sums_ + i, up_sums_ + i, hidden + b * rows + row, part.count);
            });
        });
        copy_row(hidden, in_, s.batch * rows);
        multiply(at<const T>(down), n, rows, s.out.copy(0), per_sequence);
        add(at<const float>(post_norm));
    }

    // x_ += rms_norm(W_o attention(rms_norm(x_)))
    void attention(const Layer& layer, int64_t row, int64_t count) {
        norm(at<const float>(layer.seq_norm));
        multiply(at<const T>(layer.w_qkv), 3 * s.d, s.d, s.qkv.copy(0), false);

        for (int64_t b = 0; b < s.batch; ++b) rotate(qkv(b, 0), layer.q_norm, b, queries_ + b * s.d);
        const int64_t step = keys_per_piece(count), pieces = divide_up(count, step);
        const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
        share_evenly(s.batch * pieces, [&](int64_t task) {
            const int64_t b = task / pieces, piece = task % pieces, first = piece * step;
            T* k = at<T>(layer.k_cache) + b * layer.k_batch_stride + row * layer.k_key_stride;
            T* v = at<T>(layer.v_cache) + b * layer.v_batch_stride + row * layer.v_key_stride;
            if (first + step >= count) {
                rotate(qkv(b, 1), layer.k_norm, b, k);
                copy_row(qkv(b, 2), v, s.d);
            }
            const int64_t back = count - 1 - first;
            const Keys<T> keys{k - back * layer.k_key_stride, v - back * layer.v_key_stride,
                               layer.k_key_stride, layer.v_key_stride, smaller(step, count - first)};
            attend_piece(queries_ + b * s.d, keys, s.heads, s.head_dim, scale, scores_, partial(b, pieces),
                         piece);
        });
        T* attended = s.qkv.copy(0);
        share_evenly(s.batch * s.heads, [&](int64_t task) {
            join_pieces(partial(task / s.heads, pieces), task % s.heads, s.heads, s.head_dim,
                        attended + task * s.head_dim);
        });
        copy_row(attended, in_, s.batch * s.d);

        multiply(at<const T>(layer.w_o), s.d, s.d, s.out.copy(0), false);
        add(at<const float>(layer.seq_post_norm));
    }

    template <class F>
    void share_evenly(int64_t tasks, F&& f) {
        const auto first = [&](int64_t owner) { return owner * tasks / team_.workers(); };
        share_stage(
            team_, id_, [&](int64_t owner) { return first(owner + 1) - first(owner); },
            [&](int64_t owner, int64_t task) { f(first(owner) + task); });
    }

    Partial partial(int64_t b, int64_t pieces) const {
        const int64_t scores = s.heads * kMostPieces;
        return {s.largest.copy(0) + b * scores, s.totals.copy(0) + b * scores,
                s.weighted.copy(0) + b * pieces * s.d, pieces};
    }

    // Queries (0), keys (1) or values (2) of the token of sequence b: (H, D).
    const T* qkv(int64_t b, int64_t which) const { return s.qkv.copy(0) + (3 * b + which) * s.d; }

    template <class Out>
    void rotate(const T* from, int64_t norm_weight, int64_t b, Out* to) {
        const int64_t n = s.head_dim;
        for (int64_t h = 0; h < s.heads; ++h)
            normalize_and_rotate(from + h * n, at<const float>(norm_weight), s.cos + b * n / 2,
                                 s.sin + b * n / 2, turned_, to + h * n, n, s.eps);
    }

    const Step<T>& s;
    Team& team_;
    const int id_;
    T* const x_;
    float* const in_;
    float* const queries_;
    float* const gate_sums_;
    float* const up_sums_;
    float* const scores_;
    float* const turned_;
};

template <class T>
void decode(const Step<T>& step) {
    parallel_region([&](Team& team, int id) { Worker<T>(step, team, id).run(); });
}

}  // namespace

void decode_step(Dtype dtype, const int64_t* layers, const int64_t* visible, int64_t n_layers,
                 int64_t n_prefix, const void* x, const float* cos, const float* sin, const float* final_norm,
                 const void* head, void* prefix_output, void* hidden, float* logits, int64_t batch, int64_t d,
                 int64_t heads, int64_t intermediate, int64_t vocab, double eps) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        if constexpr (!std::is_same_v<T, double>) {
            const Step<T> step{layers,
                               visible,
                               n_layers,
                               n_prefix,
                               static_cast<const T*>(x),
                               cos,
                               sin,
                               final_norm,
                               static_cast<const T*>(head),
                               static_cast<T*>(prefix_output),
                               static_cast<T*>(hidden),
                               logits,
                               batch,
                               d,
                               heads,
                               intermediate,
                               vocab,
                               static_cast<float>(eps)};
            decode(step);
        }
    });
}

}  // namespace ttt::TTT_ISA
