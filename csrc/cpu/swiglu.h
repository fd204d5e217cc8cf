// Kernels of swiglu.
#pragma once

#define TTT_DECLARE_SWIGLU

#define TTT_LIST_SWIGLU(X)
