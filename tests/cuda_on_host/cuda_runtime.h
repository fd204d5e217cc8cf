// Found instead of CUDA's own header when csrc/cuda is compiled for the host: as much of it as the kernels
// use.
#pragma once

#include "device.h"
#include "runtime.h"
