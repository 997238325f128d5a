"""Metal kernels over compressed caches; the same operations as triton_kernels."""

if __name__ == "metal_kernels":
    raise ImportError("tqai's kernels are imported as tqai_plugins.metal_kernels")
