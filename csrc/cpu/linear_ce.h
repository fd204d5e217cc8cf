// Kernels of linear_ce.
#pragma once

#define TTT_DECLARE_LINEAR_CE

#define TTT_LIST_LINEAR_CE(X)
