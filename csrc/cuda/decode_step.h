// What one step of decode reads and writes, in the device's memory and in a block's.
#pragma once

#include "cuda/decode_attention.h"
#include "cuda/decode_weights.h"

namespace ttt::cuda {
namespace {

template <class T>
struct Step {
    const Layer* layers;
    const int64_t* visible;
    const T* x;
    const float* cos;
    const float* sin;
    const float* final_norm;
    const T* head;
    T* prefix_output;
    T* hidden;
    float* logits;
    int n_layers, n_prefix, batch, d, heads, intermediate, vocab;
    float eps;
    // Of the rings (decode_weights.h).
    int slots, segment;
    // In scratch: the barrier's counter, results of products, and what pieces of attention leave: (batch,
    // heads, pieces) of softmax and of values (D).
    unsigned* counter;
    T* qkv;
    T* out;
    T* gated;
    Softmax* softmax;
    float* values;
};

constexpr int kLine = 128;

// Where a block's shared memory has what.
struct Layout {
    int visible, sums, x, operand, rings, bytes;

    __host__ __device__ Layout(int n_layers, int sequences, int d, int heads, int intermediate, int element,
                               int rings_bytes) {
        const int row = (d > intermediate ? d : intermediate) * element * sequences;
        const int attention = attention_floats(d / heads) * static_cast<int>(sizeof(float));
        visible = n_layers * static_cast<int>(sizeof(Layer));
        sums = visible + n_layers * 2 * static_cast<int>(sizeof(int64_t));
        x = sums + 2 * sequences * kWarps * static_cast<int>(sizeof(float));
        operand = x + sequences * d * element;
        // Copies in bulk are fastest to whole lines.
        rings = divide_up(operand + (row > attention ? row : attention), kLine) * kLine;
        bytes = rings + rings_bytes;
    }
};

// Hands out parts of scratch, each beginning on a line.
class Scratch {
  public:
    explicit Scratch(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
    template <class E>
    E* take(int64_t n) {
        E* const part = reinterpret_cast<E*>(memory_ + bytes_);
        bytes_ += (n * static_cast<int64_t>(sizeof(E)) + kLine - 1) / kLine * kLine;
        return part;
    }
    int64_t bytes() const { return bytes_; }

  private:
    unsigned char* const memory_;
    int64_t bytes_ = 0;
};

template <class T>
int64_t place(Step<T>& step, void* memory) {
    Scratch scratch(memory);
    const int64_t d = step.d, batch = step.batch, pieces = batch * step.heads * most_pieces(step.heads);
    step.counter = scratch.take<unsigned>(1);
    step.qkv = scratch.take<T>(batch * 3 * d);
    step.out = scratch.take<T>(batch * d);
    step.gated = scratch.take<T>(batch * step.intermediate);
    step.softmax = scratch.take<Softmax>(pieces);
    step.values = scratch.take<float>(pieces * (d / step.heads));
    return scratch.bytes();
}

}  // namespace
}  // namespace ttt::cuda
