"""The C++ and the CUDA extension, if they were built: the modules, or the reason why there is none."""

from functools import cache
from importlib import import_module, resources
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

DTYPES = tuple(_DTYPE_CODES)
"""Element types that the C++ kernels take."""


def _record(name: str) -> str:
    """Why an extension was not built, as it was recorded then; empty where nothing was."""
    file = resources.files("ttt_kernels").joinpath(f"{name}_build_failure.txt")
    return file.read_text().strip() if file.is_file() else ""


cpu: ModuleType | None
missing: str
try:
    # torch is imported above: the extension runs on the thread pool that torch has loaded.
    from ttt_kernels import _cpu as cpu  # type: ignore[no-redef,attr-defined,unused-ignore]

    missing = ""
except ImportError as error:
    cpu = None
    missing = _record("_cpu") or f"the C++ extension does not load: {error}"


@cache
def load_cuda() -> tuple[ModuleType | None, str]:
    """The CUDA extension, which is imported where there is a driver, or why there is none."""
    if find_spec("ttt_kernels._cuda") is None:
        return None, _record("_cuda") or "the CUDA extension was not built"
    if not torch.backends.cuda.is_built():
        return None, "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return None, "no GPU, or no driver of one, is available"
    try:
        module = import_module("ttt_kernels._cuda")
    except ImportError as error:
        return None, f"the CUDA extension does not load: {error}"
    reason = module.unusable()
    return (None, f"the CUDA extension cannot use the driver: {reason}") if reason else (module, "")


def cuda_kernels() -> ModuleType:
    """The CUDA extension; callers have asked `backends` first, so that it is there."""
    module, reason = load_cuda()
    assert module is not None, reason
    return module


def stream(device: torch.device) -> int:
    """Address of the stream that kernels on a device are launched on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def kernels() -> ModuleType:
    """The extension module; callers have asked `backends` first, so that it is there."""
    assert cpu is not None, missing
    return cpu


def dtype_code(dtype: torch.dtype) -> int:
    """Code of an element type in csrc/common/scalar.h."""
    return _DTYPE_CODES[dtype]


def addresses(*tensors: Tensor | None) -> list[int]:
    """Of first elements; 0 for a tensor that is missing."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def located(rows: Tensor | None) -> tuple[int, int]:
    """Address and row stride of a matrix that may be missing."""
    return (0, 0) if rows is None else (rows.data_ptr(), rows.stride(0))


_CACHE_BYTES = 32 << 20
"""About what the caches of a processor's neighbouring cores hold."""


def beyond_caches(*results: Tensor | None) -> bool:
    """Whether results are too large to stay in a cache until they are read."""
    return sum(0 if t is None else t.numel() * t.element_size() for t in results) > _CACHE_BYTES


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type that the kernels compute in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
