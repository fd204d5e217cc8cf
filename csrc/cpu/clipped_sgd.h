// Kernels of clipped_sgd.
#pragma once

#define TTT_DECLARE_CLIPPED_SGD

#define TTT_LIST_CLIPPED_SGD(X)
