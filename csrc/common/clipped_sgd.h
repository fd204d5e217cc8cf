// Formulas of clipped SGD (ttt_kernels/clipped_sgd/reference.py), the same for every kernel of it; V is a
// number or a vector of them.
#pragma once

#include <cmath>

#include "common/scalar.h"

namespace ttt::TTT_ISA {

// One more product of an inner product, in float64: squares of float32 overflow from 1.8e19 on.
template <class V>
TTT_HOST_DEVICE inline V add_product(V sum, V a, V b) {
    return sum + a * b;
}

// One more term of a weighted sum: a new weight is w plus -lr s times g, in the type computed in.
template <class V, class C>
TTT_HOST_DEVICE inline V add_term(V sum, C factor, V x) {
    return sum + factor * x;
}

// What becomes of a sequence whose gradients have this sum of squares: its norm, the factor s, and whether it
// clips. A NaN norm counts as clipped, so that it shows in every weight. A threshold of 0 stands for none.
struct Clip {
    double norm, scale;
    bool clips;
};
TTT_HOST_DEVICE inline Clip clip(double square, double max_norm) {
    const double norm = std::sqrt(square);
    const bool clips = max_norm != 0 && !(norm < max_norm);
    return {norm, clips ? max_norm / norm : 1.0, clips};
}

}  // namespace ttt::TTT_ISA
